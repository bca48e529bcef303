"""Progress of a training run: its own bar, or reports to a display that several runs share."""

from __future__ import annotations

from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from deltakd.io.progress import Display
from deltakd.training.callbacks.steps import at_step_end
from deltakd.training.module import DistillationModule


@final
class ProgressBar(RichProgressBar):
    """Lightning's Rich bar over all micro-batches of the run, with loss, tokens/s and time left.

    Args:
        description: text before the bar, such as the run's name.
    """

    def __init__(self, description: str = "training") -> None:
        super().__init__(leave=True)
        self.description = description

    def _get_train_description(self, current_epoch: int) -> str:
        # Training is one stream of steps (data/batches/sampler.py), so Lightning's "Epoch 0/0" would mislead.
        return self.description

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return short names and rounded numbers: ``loss 2.3450  tokens/s 12345``."""
        items = super().get_metrics(trainer, pl_module)
        shown: dict[str, Any] = {}
        for name, value in items.items():
            if name == "v_num":
                continue
            number = float(value) if isinstance(value, int | float) else float("nan")
            shown[name] = f"{number:.0f}" if name == "tokens/s" else f"{number:.4f}"
        return shown


@final
class DisplayedTraining(L.Callback):
    """Reports optimiser steps and their loss to a display.

    Args:
        display: the display.
    """

    def __init__(self, display: Display) -> None:
        self.display = display

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Report at the end of an optimiser step."""
        if at_step_end(trainer):
            assert isinstance(pl_module, DistillationModule)
            note = f"loss {pl_module.step_metrics['train/loss']:.4f}"
            self.display.progress("training", trainer.global_step, pl_module.total_steps, note)
