"""Tells the rollouts how validation went, where the student's share of rows depends on it."""

from __future__ import annotations

from typing import Any, final

import lightning as L

from deltakd.rollouts.data import RolloutData
from deltakd.training.callbacks.steps import at_step_end
from deltakd.training.callbacks.validation import Validation


@final
class ShareAfterValidation(L.Callback):
    """Moves the student's share of rows after each validation: before the checkpoint, which holds it.

    Args:
        validation: comes before this callback.
    """

    def __init__(self, validation: Validation) -> None:
        self._validation = validation

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Pass on the cross-entropy if this optimiser step was validated; all ranks have the same."""
        if self._validation.last_step != trainer.global_step or not at_step_end(trainer):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, RolloutData)
        assert data.loader is not None
        metrics = self._validation.last_metrics
        # A loss of the user's may log no cross-entropy.
        data.loader.share.after_validation(metrics.get("val/ce", metrics["val/loss"]))
