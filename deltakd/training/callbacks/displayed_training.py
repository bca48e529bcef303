"""The training run on a display that several runs share."""

from __future__ import annotations

from typing import Any, final

import lightning as L

from deltakd.io.progress import Display
from deltakd.training.callbacks.steps import at_step_end
from deltakd.training.module import DistillationModule


@final
class DisplayedTraining(L.Callback):
    """Reports optimiser steps, with loss and speed, to a display.

    Args:
        display: where to.
    """

    def __init__(self, display: Display) -> None:
        self.display = display

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Report at the end of an optimiser step."""
        if at_step_end(trainer):
            assert isinstance(pl_module, DistillationModule)
            note = f"loss {pl_module.step_metrics['train/loss']:.4f}"
            self.display.progress("training", trainer.global_step, pl_module.total_steps, note)
