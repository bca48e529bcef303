"""The training log: losses, token counts and speed, continued across interruptions."""

from __future__ import annotations

from collections import Counter
from typing import Any, final

import lightning as L
import psutil
import torch

from deltakd.references import ServedReferences
from deltakd.training.callbacks.clock import DeviceClock
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
        #: With two tokenizers: this rank's valid tokens, and those of them that are aligned with the teachers' text.
        self.alignable_tokens = 0
        self.aligned_tokens = 0
        #: Of training, on the device; up to the last row of the log, and a little behind after it.
        self.seconds = 0.0
        #: Valid tokens per second of late, for a progress bar; 0 before the first step.
        self.recent_rate = 0.0
        self._clock = DeviceClock()
        self._window = (0, 0.0)
        #: Counts of the current step, added once it is whole: one that breaks off is begun again.
        self._of_step: Counter[str] = Counter()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the seconds; waits for the device."""
        self.seconds += self._clock.take(wait=True)
        return {
            "valid_tokens": self.valid_tokens,
            "positions": self.positions,
            "real_positions": self.real_positions,
            "alignable_tokens": self.alignable_tokens,
            "aligned_tokens": self.aligned_tokens,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
        self._window = (self.valid_tokens, self.seconds)

    @property
    def alignment(self) -> dict[str, float]:
        """``data/aligned_fraction`` of the tokens trained so far, on this rank; empty with one tokenizer."""
        fraction = self.aligned_tokens / max(1, self.alignable_tokens)
        return {"data/aligned_fraction": fraction} if self.alignable_tokens else {}

    @property
    def tokens_per_second(self) -> float:
        """Valid tokens per second of training, over the whole run and all ranks."""
        return self.valid_tokens / self.seconds if self.seconds else 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._clock.start(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stop the clock; at the end of an optimiser step that is logged, read its metrics and log them.

        Raises:
            NonFiniteLossError: the step's loss or gradient is not finite.
        """
        self._clock.stop(pl_module.device)
        self._of_step.update(_counts(batch))
        if not at_step_end(trainer):
            return
        for name, count in self._of_step.items():
            setattr(self, name, getattr(self, name) + count)
        self._of_step.clear()
        self.valid_tokens += batch.step_tokens
        assert isinstance(pl_module, DistillationModule)
        step = trainer.global_step
        is_logged = step % self.every_n_steps == 0 or step == pl_module.total_steps
        if is_logged:
            pl_module.settle()
        self.seconds += self._clock.take(wait=is_logged)
        if is_logged or pl_module.device.type != "cuda":
            # A GPU's seconds would lag behind the tokens.
            self.recent_rate = self._rate()
        if not is_logged:
            return
        if trainer.progress_bar_callback is not None:
            # Lightning's own bar. It wants tensors on the device, and making one waits.
            pl_module.log("loss", pl_module.step_metrics["train/loss"], prog_bar=True, logger=False)
            pl_module.log("tokens/s", self.recent_rate, prog_bar=True, logger=False)
        speed = {
            "train/tokens_per_second": self.recent_rate,
            "train/padding_fraction": 1 - self.real_positions / self.positions,
            "train/memory_mib": _memory_mib(),
            **self.alignment,
            **_waits(pl_module),
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


def _counts(batch: Batch) -> dict[str, int]:
    """Return what a micro-batch adds to the counts of the log."""
    found = {"positions": batch.positions, "real_positions": batch.real_positions}
    if batch.other is None:
        return found
    alignment = batch.other.alignment
    aligned = {"alignable_tokens": len(alignment.student_spans), "aligned_tokens": alignment.aligned_tokens}
    return found | aligned


def _waits(module: DistillationModule) -> dict[str, float]:
    """Return the seconds that steps waited for a server of references since the last row; empty if none is asked."""
    references = module.step.references
    if not isinstance(references, ServedReferences):
        return {}
    return {"reference/wait_seconds": references.take_wait_seconds()}


def _memory_mib() -> float:
    """Return this process's MiB: the peak so far on its GPU, or without a GPU its CPU memory now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20
