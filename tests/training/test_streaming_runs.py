"""Whole runs over streamed data."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.training.run import run_training
from tests.distributed.processes import on_ranks
from tests.tiny import World, make_rows, save_model, write_rows
from tests.training.test_interruption import start, wait_for_step


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    for number in range(3):
        write_rows(tmp_path / "shards" / f"{number}.jsonl", make_rows(13, 10 + number))
    return tmp_path / "shards"


STREAM = ("data.streaming=true", "data.shuffle_buffer=20", "data.val=null")


def student(directory: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(directory.student / "model.safetensors")


def test_a_run_over_a_stream_ends_with_its_passes(
    train: Callable[..., RunDirectory], shards: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    options = (f"data.train={shards}", "data.streaming=true", "trainer.max_epochs=1", "trainer.max_steps=100")
    run = train("delta_kd", *options, "trainer.val_every_n_steps=4", "evaluation.generate=false")
    summary = run.read_summary()
    counts = summary["meta"]["data"]
    steps = -(-(39 - counts["excluded"]) // 4)
    assert counts["train/examples"] == 4 * steps == counts["train_rows"] - counts["excluded"]
    assert f"end with step {steps} of trainer.max_steps=100" in caplog.text
    # The last step is validated, though it is no fourth one; and the run is finished there.
    assert steps % 4
    with (run.path / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["val/loss"]][-1] == steps
    again = train("delta_kd", *options, "trainer.val_every_n_steps=4", "evaluation.generate=false", "resume=true")
    assert again.read_summary() == summary


@pytest.mark.slow
def test_a_killed_run_over_a_stream_is_bitwise_the_uninterrupted_one(
    train: Callable[..., RunDirectory], shards: Path, world: World, tmp_path: Path
) -> None:
    options = (
        *STREAM,
        f"data.train={shards}/*.jsonl",
        "trainer.max_steps=60",
        "trainer.accumulate_grad_batches=2",
        "trainer.checkpoint_every_n_steps=1",
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = train("delta_kd", *options, name="whole")
    torch.set_num_threads(threads)
    directory = tmp_path / "killed"
    arguments = [*world.overrides(directory, "delta_kd", *options), "resume=true"]
    for step, signum in ((7, signal.SIGKILL), (30, signal.SIGTERM)):
        process = start(arguments)
        wait_for_step(directory, step, process)
        os.kill(process.pid, signum)
        process.communicate()
    process = start(arguments)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    one, other = student(whole), student(RunDirectory(directory))
    assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (RunDirectory(path).read_summary()["meta"]["data"] for path in (whole.path, directory))
    assert one == other


def test_a_run_does_not_go_on_with_other_shards_unless_it_is_told_to(
    train: Callable[..., RunDirectory], shards: Path
) -> None:
    options = (*STREAM, f"data.train={shards}")
    # Steps of a run that is not finished: its last checkpoint is one of step 6.
    run = train("delta_kd", *options, "trainer.max_steps=6")
    (run.path / "summary.json").unlink()
    write_rows(shards / "1.jsonl", make_rows(12, 3))
    write_rows(shards / "7.jsonl", make_rows(2, 3))
    (shards / "2.jsonl").unlink()
    with pytest.raises(ConfigError) as caught:
        train("delta_kd", *options, "trainer.max_steps=6", "resume=true")
    (problem,) = caught.value.problems
    assert problem.startswith("data.train: the shards are others than when this run began: ")
    for part in ("2.jsonl is gone", "7.jsonl is new", "1.jsonl has changed ("):
        assert part in problem
    run = train("delta_kd", *options, "trainer.max_steps=6", "resume=force")
    assert len(run.read_summary()["meta"]["changed_inputs"]) == 1


def run(arguments: list[str], directory: Path) -> None:
    run_training(make_settings(compose_config("train", arguments)), directory)


@pytest.mark.slow
def test_two_ranks_train_on_the_steps_of_one_and_end_together(shards: Path, world: World, tmp_path: Path) -> None:
    options = (
        *STREAM,
        f"data.train={shards}",
        "trainer.max_epochs=2",
        "trainer.max_steps=100",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
        "strategy=ddp",
        "data.batch_size=2",
        # Each rank draws its own dropout.
        f"model.student.path={save_model(tmp_path / 'plain', seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)}",
        "optim.lr=0.001",
    )
    two, one = tmp_path / "two", tmp_path / "one"
    on_ranks(2, run, world.overrides(two, "delta_kd", *options), two)
    run(world.overrides(one, "delta_kd", *options, "trainer.devices=1", "strategy=auto", "data.batch_size=4"), one)
    records = []
    for directory in (two, one):
        with (directory / "metrics.csv").open() as file:
            records.append([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert len(records[0]) == len(records[1]) == -(-2 * 39 // 4)
    assert records[0] == pytest.approx(records[1], rel=1e-4)
    assert RunDirectory(two).read_summary()["meta"]["data"] == RunDirectory(one).read_summary()["meta"]["data"]
