"""Loggers: W&B never asks and never hangs; metrics.csv survives a resumption."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import pytest

from deltakd.tracking import loggers
from deltakd.tracking.loggers import finish_loggers, tensorboard_logger, wandb_logger


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither key nor mode nor netrc of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)


def start(directory: Path, **options: Any) -> Any:
    common = {"name": "run", "config": {"seed": 1}, "resume_step": 0, "project": "deltakd"}
    return wandb_logger(directory=directory, **common, **options)


def test_wandb_is_offline_without_an_account_and_one_run_when_resumed(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        logger = start(tmp_path)
        ids.append(logger.experiment.id)
        assert logger.experiment.settings.mode == "offline"
        logger.log_metrics({"val/loss": 1.0}, step=3)
        finish_loggers([logger])
    assert ids[0] == ids[1]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_an_account_without_a_network_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    logger = start(tmp_path)
    assert logger.experiment.settings.mode == "offline"
    finish_loggers([logger])
    assert time.monotonic() - started < 30


def test_unknown_mode(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logger.wandb.mode is 'on'; allowed: auto, online, offline, disabled"):
        start(tmp_path, mode="on")


def test_metrics_csv_goes_on_after_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    first = loggers.csv_logger(directory=tmp_path, name="run", config={}, resume_step=0)
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": step / 10}, step=step)
    first.log_metrics({"val/loss": 9.0}, step=2)
    first.save()
    second = loggers.csv_logger(directory=tmp_path, name="run", config={}, resume_step=2)
    second.log_metrics({"train/loss": 5.0}, step=3)
    second.save()
    with (tmp_path / "metrics.csv").open() as file:
        rows = [(row["step"], row["train/loss"], row["val/loss"]) for row in csv.DictReader(file)]
    assert rows == [("1", "0.1", ""), ("2", "0.2", ""), ("2", "", "9.0"), ("3", "5.0", "")]


def test_tensorboard_writes_into_the_run_directory(tmp_path: Path) -> None:
    logger = tensorboard_logger(directory=tmp_path, name="run", config={"seed": 1}, resume_step=0)
    logger.log_metrics({"train/loss": 1.0}, step=1)
    finish_loggers([logger])
    assert list((tmp_path / "tensorboard").glob("events.*"))
