"""Progress of a training run, in optimiser steps, with loss and speed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, final

import lightning as L

from deltakd.io.progress import Advance, current_display, progress_bar
from deltakd.training.callbacks.steps import at_step_end
from deltakd.training.callbacks.training_log import TrainingLog
from deltakd.training.module import DistillationModule


@final
class TrainingProgress(L.Callback):
    """Shows optimiser steps, their loss and valid tokens a second wherever ``progress_bar`` shows progress.

    Lightning's own bar counts micro-batches and starts with a rate of 0.

    Args:
        name: of the run.
        training_log: knows the speed.
        shown: False: only report to a display that several runs share.
    """

    def __init__(self, name: str, training_log: TrainingLog, shown: bool = True) -> None:
        self.name = name
        self.shown = shown
        self._training_log = training_log
        self._open = ExitStack()
        self._advance: Advance | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step from which training continues."""
        assert isinstance(pl_module, DistillationModule)
        shown = self.shown and trainer.is_global_zero
        # A display has the run's name already.
        what = "training" if current_display() is not None else self.name
        bar = progress_bar(what, pl_module.total_steps, shown, done=trainer.global_step, unit="step")
        self._advance = self._open.enter_context(bar)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Report at the end of an optimiser step, with the latest loss that need not be waited for."""
        if self._advance is None or not at_step_end(trainer):
            return
        assert isinstance(pl_module, DistillationModule)
        rate, latest = self._training_log.recent_rate, pl_module.latest_metrics.get("train/loss")
        speed = f"  {rate:,.0f} tokens/s" if rate else ""
        self._advance(trainer.global_step, f"loss {latest:.4f}{speed}" if latest is not None else "")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that later output starts below it."""
        self._open.close()
