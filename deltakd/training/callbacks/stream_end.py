"""The end of a stream: the last step is known only once it is reached."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, final

import lightning as L

from deltakd.data.batches.stream_loader import StreamLoader
from deltakd.training.callbacks.validation import Validation
from deltakd.training.module import DistillationModule
from deltakd.types import Batch

log = logging.getLogger(__name__)


@final
class StreamEnd(L.Callback):
    """Ends the run with the step that completes the passes over a stream, and keeps the stream's counts.

    For indexed data all this is known beforehand, and the callback does nothing.

    Args:
        validation: must also run after the last step.
    """

    def __init__(self, validation: Validation | None) -> None:
        self.validation = validation
        #: As in ``LoadedSets.counts``; empty for indexed data.
        self.counts: dict[str, int] = {}
        self._total_steps: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the number of steps if the last one is known."""
        return {"counts": self.counts, "total_steps": self._total_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts, self._total_steps = state_dict["counts"], state_dict["total_steps"]

    def saved_steps(self, checkpoint: Mapping[str, Any], most: int) -> int:
        """Return the optimiser steps of the run according to its checkpoint.

        Args:
            checkpoint: its content.
            most: the steps of the run, unless its passes end earlier.
        """
        known = checkpoint["callbacks"][self.state_key]["total_steps"]
        return most if known is None else min(known, most)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Update from the loader's current knowledge."""
        loader = trainer.train_dataloader
        if not isinstance(loader, StreamLoader):
            return
        assert isinstance(pl_module, DistillationModule)
        self.counts = _named(loader)
        if loader.total_steps >= pl_module.total_steps:
            return
        log.warning(
            "The passes over the stream end with step %d of trainer.max_steps=%d: the schedules of learning rate and "
            "loss stop before their end.",
            loader.total_steps,
            pl_module.total_steps,
        )
        self._total_steps = pl_module.total_steps = loader.total_steps
        if self.validation is not None:
            self.validation.steps |= {loader.total_steps}


def _named(loader: StreamLoader) -> dict[str, int]:
    counts = loader.counts._asdict()
    excluded = counts.pop("excluded")
    return {"train_rows": counts["rows"], "excluded": excluded} | {f"train/{name}": n for name, n in counts.items()}
