"""Checkpoints: the last state, to go on from, and the best student, to keep."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from deltakd.callbacks.steps import at_step_end
from deltakd.callbacks.validation import Validation

LAST = "last.ckpt"
BEST = "best.ckpt"


@final
class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames: a run killed while saving keeps the checkpoint before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` at ``path``, whole or not at all."""
        partial = f"{path}.partial"
        super().save_checkpoint(checkpoint, partial, storage_options)
        os.replace(partial, path)


@final
class Checkpoints(Checkpoint):
    """Saves ``last.ckpt`` (everything needed to resume) and ``best.ckpt`` (the student with the best objective).

    Both are written at the end of an optimiser step, after the validation of that step where there is one, so that
    a resumed run never has to repeat or skip a validation.

    Args:
        directory: where the files go.
        validation: whose metrics decide what is best; None: only ``last.ckpt``.
        objective: name of the metric, such as ``val/rougeL``.
        mode: ``max`` or ``min``.
        every_n_steps: optimiser steps between two saves of ``last.ckpt``; None: by time alone.
        every_n_minutes: minutes between two saves of ``last.ckpt``.
    """

    def __init__(
        self,
        directory: Path,
        validation: Validation | None,
        objective: str,
        mode: str,
        every_n_steps: int | None = None,
        every_n_minutes: float = 10.0,
    ) -> None:
        self.directory = directory
        self.validation = validation
        self.objective = objective
        self.mode = mode
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        #: Optimiser steps of the run; the last one is saved, too.
        self.total_steps: int | None = None
        self.best_metrics: dict[str, float] = {}
        self.best_step: int | None = None
        self._saved_at = time.monotonic()

    @property
    def last_path(self) -> Path:
        """The checkpoint to resume from."""
        return self.directory / LAST

    @property
    def best_path(self) -> Path:
        """The weights of the best student; absent where nothing was validated."""
        return self.directory / BEST

    def state_dict(self) -> dict[str, Any]:
        """The best step and its metrics."""
        return {"best_metrics": self.best_metrics, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.best_metrics = state_dict["best_metrics"]
        self.best_step = state_dict["best_step"]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save at the end of an optimiser step where one of the reasons holds."""
        step = trainer.global_step
        if not at_step_end(trainer):
            return
        validated = self.validation is not None and self.validation.last_step == step
        if validated:
            self._keep_best(trainer)
        by_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        by_time = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        # Saving is a joint act of all ranks, and their clocks differ.
        if (
            validated
            or by_steps
            or step == self.total_steps
            or trainer.strategy.reduce_boolean_decision(by_time, all=False)
        ):
            self.save_last(trainer)

    def save_last(self, trainer: L.Trainer) -> None:
        """Write ``last.ckpt`` now, and before it what the loggers hold: a resumed run logs only what comes after."""
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.last_path)
        self._saved_at = time.monotonic()

    def _keep_best(self, trainer: L.Trainer) -> None:
        assert self.validation is not None
        metrics = self.validation.last_metrics
        score, best = metrics[self.objective], self.best_metrics.get(self.objective)
        better = best is None or (score > best if self.mode == "max" else score < best)
        if better and math.isfinite(score):
            self.best_metrics, self.best_step = dict(metrics), trainer.global_step
            trainer.save_checkpoint(self.best_path, weights_only=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint's content on the CPU, tensors and plain values only.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} can't be read ({first[:150]}); remove it to start again") from None
