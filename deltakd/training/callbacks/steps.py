"""Tells which micro-batches end an optimiser step."""

from __future__ import annotations

import lightning as L


def at_step_end(trainer: L.Trainer) -> bool:
    """Return True if the micro-batch that just ended was the last of its optimiser step."""
    return trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == trainer.accumulate_grad_batches - 1
