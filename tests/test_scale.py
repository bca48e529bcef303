"""Real processes: every strategy gives the numbers of one process, and goes on where it stopped (`make test-slow`)."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltakd.callbacks.checkpoints import LAST, read_checkpoint
from tests.tiny import World, save_model

pytestmark = pytest.mark.slow

#: Name -> overrides of a strategy on two processes; nothing stays whole in ZeRO 3 here, however small it is.
STRATEGIES = {
    "ddp": [],
    "deepspeed_zero1": [],
    "deepspeed_zero2": [],
    "deepspeed_zero3": ["strategy.persistence_threshold=0"],
    "fsdp": [],
}
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def start(world: World, directory: Path, loss: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """``python -m deltakd.train`` on CPUs; dropout is off, since each rank draws its own."""
    student = world.root / "plain"
    if not student.is_dir():
        save_model(student, seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    common = [f"model.student.path={student}", "optim.lr=0.001", "optim.eps=1e-4", "trainer.accelerator=cpu"]
    command = [sys.executable, "-m", "deltakd.train", *world.overrides(directory, loss, *common, *overrides)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=world.root, capture_output=True, text=True, timeout=300)


def run(world: World, directory: Path, loss: str, *overrides: str) -> Path:
    done = start(world, directory, loss, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def metrics(directory: Path, name: str) -> list[float]:
    with (directory / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def two(strategy: str, batch_size: int) -> list[str]:
    if strategy.startswith("deepspeed") and not DEEPSPEED:
        pytest.skip("DeepSpeed is not installed: pip install 'deltakd[deepspeed]'")
    return [f"strategy={strategy}", "trainer.devices=2", f"data.batch_size={batch_size}", *STRATEGIES[strategy]]


@pytest.fixture(scope="module", params=["sft", "kd", "delta_kd"])
def one_process(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one") / request.param
    return run(world, directory, request.param, "data.batch_size=8", "trainer.max_steps=20")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_are_one(strategy: str, accumulate: int, one_process: Path, world: World, tmp_path: Path) -> None:
    many = run(
        world,
        tmp_path / "two",
        one_process.name,
        *two(strategy, 4 // accumulate),
        "trainer.max_steps=20",
        f"trainer.accumulate_grad_batches={accumulate}",
    )
    for name in ("train/loss", "val/loss"):
        torch.testing.assert_close(metrics(many, name), metrics(one_process, name), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        metrics(many, "train/grad_norm"), metrics(one_process, "train/grad_norm"), rtol=1e-4, atol=0
    )
    expected, found = (load_file(path / "student" / "model.safetensors") for path in (one_process, many))
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_answers_are_those_of_one_process(strategy: str, world: World, tmp_path: Path) -> None:
    """Validation and test sets are split over the ranks: each row once, the samples of one process."""
    answering = [
        "trainer.max_steps=2",
        "evaluation=default",
        f"evaluation.sets={{mine: {world.root / 'test.jsonl'}}}",
        "evaluation.seeds=[3]",
        "evaluation.val_limit=5",
        "evaluation.decoding.max_new_tokens=12",
        "optim.lr=1e-6",  # so that rounding can't change a sample
    ]
    alone = run(world, tmp_path / "one", "kd", "data.batch_size=8", *answering)
    many = run(world, tmp_path / "two", "kd", *two(strategy, 4), *answering)
    texts = [(path / "generations" / "mine_seed3.jsonl").read_text() for path in (alone, many)]
    assert texts[0] == texts[1]
    assert metrics(many, "val/rougeL") == metrics(alone, "val/rougeL")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_cut_in_half_is_told_and_the_one_before_it_used(
    strategy: str, world: World, tmp_path: Path
) -> None:
    options = [*two(strategy, 4), "trainer.checkpoint_every_n_steps=2", "trainer.val_every_n_steps=6"]
    whole = run(world, tmp_path / "run", "delta_kd", *options)
    losses = metrics(whole, "train/loss")
    student = load_file(whole / "student" / "model.safetensors")
    last = whole / "checkpoints" / LAST
    assert read_checkpoint(last)["global_step"] == 6
    damaged = (
        last if last.is_file() else max((p for p in last.rglob("*.*") if p.is_file()), key=lambda p: p.stat().st_size)
    )
    os.truncate(damaged, damaged.stat().st_size // 2)
    (whole / "summary.json").unlink()
    shutil.rmtree(whole / "student")
    done = start(world, whole, "delta_kd", *options, "resume=true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The run goes on from the one before it, step 4" in done.stdout + done.stderr
    torch.testing.assert_close(metrics(whole, "train/loss"), losses, rtol=1e-6, atol=0)
    resumed = load_file(whole / "student" / "model.safetensors")
    for key in student:
        torch.testing.assert_close(resumed[key], student[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_zero2"])
def test_another_number_of_processes(strategy: str, world: World, tmp_path: Path) -> None:
    common = [*STRATEGIES[strategy], "trainer.checkpoint_every_n_steps=2", "trainer.val_every_n_steps=6"]
    whole = run(world, tmp_path / "run", "delta_kd", *two(strategy, 4), *common)
    losses = metrics(whole, "train/loss")
    (whole / "summary.json").unlink()
    shutil.rmtree(whole / "student")
    last = whole / "checkpoints" / LAST
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    alone = [f"strategy={strategy}", "trainer.devices=1", *common, "resume=true"]
    wrong = start(world, whole, "delta_kd", *alone, "data.batch_size=4")
    assert wrong.returncode != 0
    assert "8 rows in an optimiser step over all processes, and this start has 4" in wrong.stderr
    done = start(world, whole, "delta_kd", *alone, "data.batch_size=8")
    if strategy.startswith("deepspeed"):
        assert "go on with as many processes as wrote them (2)" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(metrics(whole, "train/loss"), losses, rtol=1e-5, atol=0)
