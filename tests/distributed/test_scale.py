"""Real processes: every strategy gives the numbers of one process, and resumes where it stopped.

A few run always; the rest are slow (`make test-slow`).
"""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.distributed.zero import prepare_deepspeed
from deltakd.io.run_directory import LAST
from deltakd.training.callbacks.checkpoints import read_checkpoint
from deltakd.training.run import run_training
from tests.distributed.processes import on_ranks
from tests.tiny import World, save_model

#: Name -> overrides of a strategy; nothing stays whole in ZeRO 3 here, however small it is.
STRATEGIES = {
    "ddp": [],
    "deepspeed_zero1": ["strategy.persistence_threshold=0"],
    "deepspeed_zero2": ["strategy.persistence_threshold=0"],
    "deepspeed_zero3": ["strategy.persistence_threshold=0"],
    "deepspeed_zero3_offload": ["strategy.persistence_threshold=0"],
    "fsdp": [],
}
ALL = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Ranks are forked from this process: what it has imported, they need not."""
    if importlib.util.find_spec("deepspeed") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare_deepspeed()
            import deepspeed  # noqa: F401


def train(overrides: list[str], directory: Path) -> list[str]:
    """The log."""
    warnings.simplefilter("ignore")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("deltakd").addHandler(handler)
    run_training(make_settings(compose_config("train", overrides)), directory)
    return said


def run(world: World, directory: Path, loss: str, ranks: int, *overrides: str) -> Path:
    """Train on ``devices`` CPU processes; return the run's directory."""
    log_of(world, directory, loss, ranks, *overrides)
    return directory


def log_of(world: World, directory: Path, loss: str, ranks: int, *overrides: str) -> list[str]:
    """The same; what rank 0 has logged. Dropout is off, since each rank draws its own."""
    student = world.root / "plain"
    if not student.is_dir():
        save_model(student, seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    common = [f"model.student.path={student}", "optim.lr=0.001", "optim.eps=1e-4", "trainer.accelerator=cpu"]
    common += [f"trainer.devices={ranks}", f"data.batch_size={8 // ranks}"]
    return on_ranks(ranks, train, world.overrides(directory, loss, *common, *overrides), directory)[0]


def chosen(strategy: str) -> list[str]:
    if strategy.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'deltakd[deepspeed]'")
    if strategy.endswith("offload") and shutil.which("g++") is None:
        pytest.skip("there is no g++, which compiles DeepSpeed's AdamW")
    return [f"strategy={strategy}", *STRATEGIES[strategy]]


def metrics(directory: Path, name: str) -> list[float]:
    with (directory / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def unfinish(directory: Path) -> None:
    """As if the run had stopped before it was exported."""
    (directory / "summary.json").unlink()
    shutil.rmtree(directory / "student")


def drop_last(directory: Path, step: int) -> None:
    """As if the run had stopped at the checkpoint before the last one, that of ``step``."""
    last, previous = (directory / "checkpoints" / name for name in (LAST, "previous.ckpt"))
    assert read_checkpoint(previous)["global_step"] == step
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    unfinish(directory)


def assert_same_run(found: Path, expected: Path) -> None:
    """The same losses to 1e-5, the same gradients and students to 1e-4."""
    for name, tolerance in (("train/loss", 1e-5), ("val/loss", 1e-5), ("train/grad_norm", 1e-4)):
        torch.testing.assert_close(metrics(found, name), metrics(expected, name), rtol=tolerance, atol=0)
    students = [load_file(path / "student" / "model.safetensors") for path in (found, expected)]
    assert students[0].keys() == students[1].keys()
    for key in students[1]:
        torch.testing.assert_close(students[0][key], students[1][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_zero3"])
def test_everything_sharded_over_two_processes_is_one(strategy: str, world: World, tmp_path: Path) -> None:
    """Student and references in parts: the numbers of one process, and at most 0.6 of each model on a rank."""
    options = ["trainer.max_steps=3"]
    one = run(world, tmp_path / "one", "delta_kd", 1, *options)
    two = run(world, tmp_path / "two", "delta_kd", 2, *options, *chosen(strategy), "reference.sharding=shard")
    assert_same_run(two, one)
    whole, part = (summary(path)["meta"]["resident_mib"] for path in (one, two))
    assert part.keys() == {"student", "student_raw", "teacher", "teacher_raw"}
    for role in part:
        assert part[role] <= 0.6 * whole[role]
    assert summary(two)["meta"]["parameters"] == summary(one)["meta"]["parameters"]


@pytest.fixture(scope="module", params=["sft", "kd", "delta_kd"])
def one_process(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(world, tmp_path_factory.mktemp("one") / request.param, request.param, 1, "trainer.max_steps=20")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@ALL
def test_two_processes_are_one(strategy: str, accumulate: int, one_process: Path, world: World, tmp_path: Path) -> None:
    accumulation = [f"data.batch_size={4 // accumulate}", f"trainer.accumulate_grad_batches={accumulate}"]
    options = [*chosen(strategy), "trainer.max_steps=20", *accumulation]
    assert_same_run(run(world, tmp_path / "two", one_process.name, 2, *options), one_process)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicate", "shard"])
@ALL
def test_references_of_each_rank(strategy: str, sharding: str, world: World, tmp_path: Path) -> None:
    """Replicated in their dtype, or in parts, whatever the student's strategy; the losses stay."""
    dtypes = ["model.teacher.dtype=bfloat16", "model.teacher_raw.dtype=bfloat16"]
    one = run(world, tmp_path / "one", "delta_kd", 1, *dtypes)
    two = run(world, tmp_path / "two", "delta_kd", 2, *dtypes, *chosen(strategy), f"reference.sharding={sharding}")
    torch.testing.assert_close(metrics(two, "train/loss"), metrics(one, "train/loss"), rtol=1e-4, atol=0)
    whole, part = (summary(path)["meta"]["resident_mib"] for path in (one, two))
    for role in ("student_raw", "teacher", "teacher_raw"):
        assert part[role] <= 0.6 * whole[role] if sharding == "shard" else part[role] == whole[role]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_zero3"])
def test_heads_that_are_not_tied(strategy: str, family: str, world: World, tmp_path: Path) -> None:
    """Embeddings and head are gathered where they are used, whether they are one tensor or two."""
    student = save_model(tmp_path / family, seed=1, family=family, tie_word_embeddings=family == "opt", dropout=0.0)
    options = [f"model.student.path={student}", "reference.sharding=shard", "trainer.max_steps=4"]
    one = run(world, tmp_path / "one", "delta_kd", 1, *options)
    assert_same_run(run(world, tmp_path / "two", "delta_kd", 2, *options, *chosen(strategy)), one)


@pytest.mark.slow
@ALL
def test_an_adapter_switched_off_is_the_raw_student(strategy: str, world: World, tmp_path: Path) -> None:
    options = ["model/lora=default", "reference.sharding=shard", "trainer.max_steps=4"]
    one = run(world, tmp_path / "one", "delta_kd", 1, *options)
    two = run(world, tmp_path / "two", "delta_kd", 2, *options, *chosen(strategy))
    torch.testing.assert_close(metrics(two, "train/loss"), metrics(one, "train/loss"), rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics(two, "val/loss"), metrics(one, "val/loss"), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("half_weights", ["masters", "stochastic"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_half_precision_weights_go_on(strategy: str, half_weights: str, world: World, tmp_path: Path) -> None:
    """Masters and moments are restored in float32, whole or in parts: the run ends as if it had not stopped."""
    options = [
        *chosen(strategy),
        "model.student.dtype=bfloat16",
        f"optim.half_weights={half_weights}",
        "optim.lr=1e-4",
        "trainer.checkpoint_every_n_steps=2",
        "trainer.val_every_n_steps=6",
    ]
    stopped = run(world, tmp_path / "run", "kd", 2, *options)
    losses, student = metrics(stopped, "train/loss"), load_file(stopped / "student" / "model.safetensors")
    drop_last(stopped, 4)
    run(world, stopped, "kd", 2, *options, "resume=true")
    assert metrics(stopped, "train/loss") == losses
    again = load_file(stopped / "student" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in student.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ([], 1e-5),
        (["model.gradient_checkpointing=true"], 1e-5),
        (["data.batch_size=2", "trainer.accumulate_grad_batches=2"], 1e-5),
        (["model/lora=default"], 1e-3),  # adapters take their input in the dtype of their weights
        (["trainer.compile=true"], 1e-3),
    ],
)
def test_under_autocast_sharded_weights_are_those_of_ddp(
    options: list[str], tolerance: float, world: World, tmp_path: Path
) -> None:
    """Losses and gradients, the export, and a run that goes on from its checkpoint."""
    common = ["trainer.precision=bf16-mixed", "reference.sharding=shard", "trainer.max_steps=6", *options]
    common += ["trainer.checkpoint_every_n_steps=2", "trainer.val_every_n_steps=6"]
    ddp = run(world, tmp_path / "ddp", "delta_kd", 2, "strategy=ddp", *common)
    fsdp = run(world, tmp_path / "fsdp", "delta_kd", 2, "strategy=fsdp", *common)
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        torch.testing.assert_close(metrics(fsdp, name), metrics(ddp, name), rtol=tolerance, atol=0)
    losses = metrics(fsdp, "train/loss")
    drop_last(fsdp, 4)
    run(world, fsdp, "delta_kd", 2, "strategy=fsdp", *common, "resume=true")
    torch.testing.assert_close(metrics(fsdp, "train/loss"), losses, rtol=1e-6, atol=0)
    files = [path / "student" / "model.safetensors" for path in (ddp, fsdp)]
    ours, theirs = (load_file(next(path.parent.glob("*.safetensors"))) for path in files)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert theirs[key].dtype == value.dtype == torch.float32
        torch.testing.assert_close(theirs[key], value, rtol=tolerance, atol=10 * tolerance * 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("after", [2, 1])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_zero2", "deepspeed_zero3"])
def test_an_adapter_goes_on(strategy: str, after: int, world: World, tmp_path: Path) -> None:
    """Its checkpoint holds what is trained; the frozen weights come from their source again."""
    options = [
        *chosen(strategy),
        "model/lora=default",
        "trainer.checkpoint_every_n_steps=2",
        "trainer.val_every_n_steps=6",
    ]
    stopped = run(world, tmp_path / "run", "kd", 2, *options)
    losses = metrics(stopped, "train/loss")
    drop_last(stopped, 4)
    run(world, stopped, "kd", after, *options, "resume=true")
    torch.testing.assert_close(metrics(stopped, "train/loss"), losses, rtol=1e-5, atol=0)


@pytest.mark.slow
@ALL
def test_answers_are_those_of_one_process(strategy: str, world: World, tmp_path: Path) -> None:
    """Validation and test sets are split over the ranks, which stop at other lengths; each row counts once."""
    answering = [
        "trainer.max_steps=2",
        "evaluation=default",
        f"evaluation.sets={{mine: {world.root / 'test.jsonl'}}}",
        "evaluation.seeds=[3]",
        "evaluation.val_limit=5",
        "evaluation.decoding.max_new_tokens=12",
        "optim.lr=1e-6",  # so that rounding can't change a sample
    ]
    alone = run(world, tmp_path / "one", "kd", 1, *answering)
    many = run(world, tmp_path / "two", "kd", 2, *chosen(strategy), *answering)
    texts = [(path / "generations" / "mine_seed3.jsonl").read_text() for path in (alone, many)]
    assert texts[0] == texts[1]
    assert metrics(many, "val/rougeL") == metrics(alone, "val/rougeL")
    assert summary(many)["mine/rougeL"] == summary(alone)["mine/rougeL"]


@pytest.mark.slow
@ALL
def test_a_checkpoint_cut_in_half_is_told_and_the_one_before_it_used(
    strategy: str, world: World, tmp_path: Path
) -> None:
    options = [*chosen(strategy), "trainer.checkpoint_every_n_steps=2", "trainer.val_every_n_steps=6"]
    whole = run(world, tmp_path / "run", "delta_kd", 2, *options)
    losses = metrics(whole, "train/loss")
    student = load_file(whole / "student" / "model.safetensors")
    last = whole / "checkpoints" / LAST
    assert read_checkpoint(last)["global_step"] == 6
    files = [last] if last.is_file() else [p for p in last.rglob("*.*") if p.is_file()]
    damaged = max(files, key=lambda p: p.stat().st_size)
    os.truncate(damaged, damaged.stat().st_size // 2)
    unfinish(whole)
    said = log_of(world, whole, "delta_kd", 2, *options, "resume=true")
    assert any("The run continues from the one before it, step 4" in message for message in said), said
    torch.testing.assert_close(metrics(whole, "train/loss"), losses, rtol=1e-6, atol=0)
    resumed = load_file(whole / "student" / "model.safetensors")
    for key in student:
        torch.testing.assert_close(resumed[key], student[key], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@ALL
def test_another_number_of_processes(strategy: str, before: int, after: int, world: World, tmp_path: Path) -> None:
    """From the checkpoint of step 4 of 8 on: weights, moments, weight decay and schedule go on as they were."""
    options = [*chosen(strategy), "trainer.max_steps=8", "trainer.checkpoint_every_n_steps=2", "optim.weight_decay=0.3"]
    options += ["trainer.val_every_n_steps=8"]
    whole = run(world, tmp_path / "whole", "delta_kd", before, *options)
    stopped = run(world, tmp_path / "stopped", "delta_kd", before, *options)
    drop_last(stopped, 6)
    with pytest.raises(AssertionError, match="8 rows in an optimiser step over all processes, and this start has 16"):
        run(world, stopped, "delta_kd", after, *options, "resume=true", f"data.batch_size={16 // after}")
    run(world, stopped, "delta_kd", after, *options, "resume=true")
    torch.testing.assert_close(metrics(stopped, "train/loss"), metrics(whole, "train/loss"), rtol=1e-6, atol=0)
    assert_same_run(stopped, whole)
