"""The progress bar."""

from __future__ import annotations

from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


@final
class ProgressBar(RichProgressBar):
    """Lightning's Rich bar, counting optimiser micro-batches of the whole run, with loss, tokens/s and time left.

    Args:
        description: what stands before the bar, such as the name of the run.
    """

    def __init__(self, description: str = "training") -> None:
        super().__init__(leave=True)
        self.description = description

    def _get_train_description(self, current_epoch: int) -> str:
        # Training is one stream of steps (see data/sampler.py), so Lightning's "Epoch 0/0" would mislead.
        return self.description

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Short names and round numbers: ``loss 2.345  tokens/s 12345``."""
        items = super().get_metrics(trainer, pl_module)
        shown: dict[str, Any] = {}
        for name, value in items.items():
            if name == "v_num":
                continue
            number = float(value) if isinstance(value, int | float) else float("nan")
            shown[name] = f"{number:.0f}" if name == "tokens/s" else f"{number:.4f}"
        return shown
