"""What tests of runs with cached references share."""

from __future__ import annotations

from pathlib import Path

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.run_directory import RunDirectory
from deltakd.training.run import run_training
from tests.rollouts.runs import column


def run(overrides: list[str]) -> RunDirectory:
    """Train with these overrides, which name the run's directory."""
    cfg = compose_config("train", overrides)
    run_training(make_settings(cfg), Path(cfg.run_dir))
    return RunDirectory(Path(cfg.run_dir))


def curves(directory: RunDirectory) -> list[float]:
    """The losses of training, then those of validation."""
    return [*column(directory, "train/loss"), *column(directory, "val/loss")]
