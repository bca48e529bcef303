"""How fast the run is, and how much it has done, across interruptions."""

from __future__ import annotations

import time
from typing import Any, final

import lightning as L

from deltakd.callbacks.steps import at_step_end
from deltakd.types import Batch

#: tokens/s is shown over about so many seconds of training.
WINDOW_SECONDS = 5.0


@final
class Throughput(L.Callback):
    """Counts valid tokens, padding and seconds of training; logs tokens/s (validation's time not counted)."""

    def __init__(self) -> None:
        self.valid_tokens = 0
        self.positions = 0
        self.real_positions = 0
        self.seconds = 0.0
        self._started = 0.0
        self._window = (0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {
            "valid_tokens": self.valid_tokens,
            "positions": self.positions,
            "real_positions": self.real_positions,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        for name, value in state_dict.items():
            setattr(self, name, value)
        self._window = (self.valid_tokens, self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Valid tokens trained on per second of training, over the whole run, all ranks."""
        return self.valid_tokens / self.seconds if self.seconds else 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stop the clock; at the end of an optimiser step log the rate since the last log."""
        self.seconds += time.perf_counter() - self._started
        self.positions += batch.attention_mask.numel()
        self.real_positions += int(batch.attention_mask.sum())
        if not at_step_end(trainer):
            return
        self.valid_tokens += batch.step_tokens
        tokens, seconds = self._window
        rate = (self.valid_tokens - tokens) / max(self.seconds - seconds, 1e-9)
        if self.seconds - seconds > WINDOW_SECONDS:
            self._window = (self.valid_tokens, self.seconds)
        pl_module.log("train/tokens_per_second", rate, prog_bar=True)
        pl_module.log("train/padding_fraction", 1 - self.real_positions / self.positions)
