"""The training log: losses, token counts and speed, continued across interruptions."""

from __future__ import annotations

import time
from typing import Any, final

import lightning as L
import psutil
import torch

from deltakd.training.callbacks.steps import at_step_end
from deltakd.training.module import DistillationModule
from deltakd.types import Batch

#: tokens/s is averaged over about this many seconds of training.
WINDOW_SECONDS = 5.0


@final
class TrainingLog(L.Callback):
    """Counts valid tokens, padding and seconds of training, and logs them with the step's losses.

    The loggers are called directly: Lightning would call them after the end-of-step callbacks, which write checkpoints,
    and an interrupted run would lose a row.

    Args:
        every_n_steps: optimiser steps between rows; the last step of the run always gets one.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.valid_tokens = 0
        self.positions = 0
        self.real_positions = 0
        self.seconds = 0.0
        self._started = 0.0
        self._window = (0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "valid_tokens": self.valid_tokens,
            "positions": self.positions,
            "real_positions": self.real_positions,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
        self._window = (self.valid_tokens, self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Valid tokens per second of training, over the whole run and all ranks."""
        return self.valid_tokens / self.seconds if self.seconds else 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stop the clock; at the end of an optimiser step, show and log its metrics."""
        self.seconds += time.perf_counter() - self._started
        self.positions += batch.attention_mask.numel()
        self.real_positions += int(batch.attention_mask.sum())
        if not at_step_end(trainer):
            return
        self.valid_tokens += batch.step_tokens
        assert isinstance(pl_module, DistillationModule)
        rate = self._rate()
        pl_module.log("loss", pl_module.step_metrics["train/loss"], prog_bar=True, logger=False)
        pl_module.log("tokens/s", rate, prog_bar=True, logger=False)
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == pl_module.total_steps:
            padding = 1 - self.real_positions / self.positions
            speed = {
                "train/tokens_per_second": rate,
                "train/padding_fraction": padding,
                "train/memory_mib": _memory_mib(),
            }
            for logger in trainer.loggers:
                logger.log_metrics(pl_module.step_metrics | speed, step=step)

    def _rate(self) -> float:
        """Return valid tokens per second over about the last WINDOW_SECONDS of training."""
        tokens, seconds = self._window
        rate = (self.valid_tokens - tokens) / max(self.seconds - seconds, 1e-9)
        if self.seconds - seconds > WINDOW_SECONDS:
            self._window = (self.valid_tokens, self.seconds)
        return rate


def _memory_mib() -> float:
    """Return this process's MiB: the peak so far on its GPU, or without a GPU its CPU memory now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20
