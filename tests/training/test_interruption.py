"""Real processes that are killed, and their runs resumed: bitwise the run that was never interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import Stopped
from deltakd.io.run_directory import RunDirectory
from deltakd.training.callbacks.checkpoints import read_checkpoint
from deltakd.training.callbacks.signals import SIGNALS
from deltakd.training.module import DistillationModule
from deltakd.training.run import run_training
from deltakd.types import Batch
from tests.tiny import World

STEPS = 60


def overrides(world: World, directory: Path, *extra: str) -> list[str]:
    """Dropout on (GPT-2's default 0.1), accumulation, several passes, validations with answers on the way."""
    return world.overrides(
        directory,
        "delta_kd",
        f"trainer.max_steps={STEPS}",
        "trainer.accumulate_grad_batches=2",
        "trainer.val_every_n_steps=7",
        "trainer.checkpoint_every_n_steps=1",
        "evaluation=default",
        f"evaluation.sets={{mine: {world.root / 'test.jsonl'}}}",
        "evaluation.val_limit=3",
        *extra,
    )


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deltakd.train", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(directory: Path, step: int, process: subprocess.Popen[str]) -> None:
    last = directory / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if last.is_file() and read_checkpoint(last)["global_step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not get going")


@pytest.fixture(scope="module")
def uninterrupted(world: World, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_training(make_settings(compose_config("train", overrides(world, directory))), directory)
    torch.set_num_threads(threads)
    return RunDirectory(directory)


def test_a_run_gives_back_the_signal_handlers_that_it_found(world: World, tmp_path: Path) -> None:
    """Those of Lightning would keep its trainer and all models in memory: a study of a thousand runs is one process."""
    found = [signal.getsignal(each) for each in SIGNALS]
    directory = tmp_path / "run"
    run_training(
        make_settings(compose_config("train", world.overrides(directory, "sft", "trainer.max_steps=1"))), directory
    )
    assert [signal.getsignal(each) for each in SIGNALS] == found


@pytest.mark.parametrize(
    "signum",
    [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
    ids=lambda s: s.name,
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    signum: signal.Signals, world: World, uninterrupted: RunDirectory, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    process = start(overrides(world, directory))
    wait_for_step(directory, 9, process)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    stopped_at = read_checkpoint(directory / "checkpoints" / "last.ckpt")["global_step"]
    assert 9 <= stopped_at < STEPS
    if signum == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in errors
        assert f"stopped by SIGTERM after {stopped_at} optimiser steps; the state is saved" in errors
        assert f"resume=true run_dir={directory}" in errors
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_training(make_settings(compose_config("train", [*overrides(world, directory), "resume=true"])), directory)
    torch.set_num_threads(threads)
    ours = load_file(RunDirectory(directory).student / "model.safetensors")
    theirs = load_file(uninterrupted.student / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    last = [read_checkpoint(d.checkpoints / "last.ckpt") for d in (RunDirectory(directory), uninterrupted)]
    for name, value in last[0]["state_dict"].items():
        assert torch.equal(value, last[1]["state_dict"][name])
    summaries = [d.read_summary() for d in (RunDirectory(directory), uninterrupted)]
    metrics = [{k: v for k, v in s.items() if k != "meta"} for s in summaries]
    assert metrics[0] == metrics[1]
    for key in ("best_step", "valid_tokens", "steps"):
        assert summaries[0]["meta"][key] == summaries[1]["meta"][key]
    curves = [(d / "metrics.csv").read_text().count("\n") for d in (directory, uninterrupted.path)]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_a_token_budget_resumes_in_the_middle_of_a_pass(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of as many rows as fit: stopped in step 11, resumed to the same last bit."""
    budget = ("data.batch_size=null", "data.max_tokens_per_batch=256", "evaluation=none", "trainer.max_steps=24")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_training(
        make_settings(compose_config("train", overrides(world, tmp_path / "whole", *budget))), tmp_path / "whole"
    )
    chosen = overrides(world, tmp_path / "stopped", *budget)
    original = DistillationModule.training_step

    def stop_in_step_11(module: DistillationModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        if batch.step == 11:
            signal.raise_signal(signal.SIGTERM)
        return original(module, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", stop_in_step_11)
    with pytest.raises(Stopped, match="after 12 optimiser steps"):
        run_training(make_settings(compose_config("train", chosen)), tmp_path / "stopped")
    monkeypatch.undo()
    run_training(make_settings(compose_config("train", [*chosen, "resume=true"])), tmp_path / "stopped")
    torch.set_num_threads(threads)
    whole, stopped = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "stopped"))
    assert whole["global_step"] == stopped["global_step"] == 24
    assert all(torch.equal(value, stopped["state_dict"][name]) for name, value in whole["state_dict"].items())
