"""What tests of whole runs on rollouts share: metrics, a kill, one process against two."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.run_directory import RunDirectory
from deltakd.training.module import DistillationModule
from deltakd.training.run import run_training
from deltakd.types import Batch
from tests.distributed.processes import on_ranks
from tests.tiny import World

ON_POLICY = ("rollout=student", "rollout.decoding.max_new_tokens=6", "data.val=null")


def column(run: RunDirectory, name: str) -> list[float]:
    """A metric of each optimiser step that has it."""
    with (run.path / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def weights(run: RunDirectory) -> dict[str, Tensor]:
    """The exported student's."""
    return load_file(run.student / "model.safetensors")


def assert_same_student(one: RunDirectory, two: RunDirectory) -> None:
    """Bit for bit, and so are the losses."""
    assert column(one, "train/loss") == column(two, "train/loss")
    first, second = weights(one), weights(two)
    assert all(torch.equal(first[key], second[key]) for key in first)


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Raise InterruptedError in the first micro-batch after so many optimiser steps."""
    original = DistillationModule.training_step

    def stopping(module: DistillationModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        if module.global_step == steps:
            raise InterruptedError
        return original(module, batch, batch_idx)

    patch.setattr(DistillationModule, "training_step", stopping)


def _run(overrides: list[str], directory: Path) -> None:
    run_training(make_settings(compose_config("train", overrides)), directory)


def compare_ranks(world: World, root: Path, loss: str, common: Sequence[str], on_two: Sequence[str]) -> None:
    """Train on one process and on two: responses, losses and students are the same up to rounding.

    Args:
        world: of the models and rows.
        root: where the runs go.
        loss: its name.
        common: overrides of both; the student must have no dropout, of which each rank draws its own.
        on_two: further overrides for two processes.
    """
    shared = ["optim.lr=0.001", "optim.eps=1e-4", "trainer.accelerator=cpu", "trainer.max_steps=4"]
    for ranks, chosen in ((1, ()), (2, on_two)):
        directory = root / str(ranks)
        sizes = [f"trainer.devices={ranks}", f"data.batch_size={8 // ranks}"]
        on_ranks(ranks, _run, world.overrides(directory, loss, *shared, *common, *sizes, *chosen), directory)
    one, two = (RunDirectory(root / name) for name in ("1", "2"))
    for name in ("train/loss", "rollout/response_length", "rollout/finished_fraction"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-5)
    first, second = weights(one), weights(two)
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-6)
