"""Logs the responses that a run's student writes."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, final

import lightning as L

from deltakd.rollouts.data import RolloutData
from deltakd.rollouts.responses import prompt_of
from deltakd.rollouts.samples import sample_record, write_samples
from deltakd.tracking.wandb_run import RunWandbLogger
from deltakd.training.callbacks.steps import at_step_end
from deltakd.training.callbacks.training_log import TrainingLog
from deltakd.training.module import DistillationModule
from deltakd.types import Batch

log = logging.getLogger(__name__)

#: Steps over which the finished fraction is averaged.
WINDOW = 20
#: Responses kept as text.
KEPT = 16
#: A drop of the finished fraction by this much, from the first steps' mean, triggers a warning.
FALL = 0.2


@final
class RolloutLog(L.Callback):
    """Adds ``rollout/...`` to the metrics of each optimiser step, and warns once if responses stop ending.

    It must come before the ``TrainingLog``, which writes the metrics.

    Args:
        training_log: knows the seconds spent on training.
        directory: the run directory.
        steps: optimiser steps (from 1) for which some responses are kept as text.
        tracker: also gets them, as a table.
    """

    def __init__(
        self,
        training_log: TrainingLog,
        directory: Path,
        steps: Collection[int],
        tracker: RunWandbLogger | None,
    ) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._training_log = training_log
        self._directory = directory
        self._steps = frozenset(steps)
        self._tracker = tracker
        self._seen = 0.0
        self._watch = FallWatch()

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds and tokens so far, and the state of the warning."""
        return {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "watch": self._watch.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.tokens = state_dict["seconds"], state_dict["tokens"]
        self._watch.load_state_dict(state_dict["watch"])

    @property
    def totals(self) -> dict[str, float]:
        """Seconds spent writing by this process, which ``training_seconds`` leaves out, and tokens over all ranks."""
        return {"seconds": round(self.seconds, 3), "tokens": self.tokens}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """At the end of an optimiser step, add the metrics of its round."""
        if not at_step_end(trainer):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, RolloutData)
        assert data.loader is not None
        assert isinstance(pl_module, DistillationModule)
        loader = data.loader
        self.seconds += loader.seconds - self._seen
        self._seen = loader.seconds
        self.tokens += loader.tokens_of_step(batch.step)
        whole = self.seconds + self._training_log.seconds
        known = {**loader.metrics, "rollout/time_fraction": self.seconds / whole if whole else 0.0}
        samples_itself = data.settings.samples_itself and not data.pairs
        pl_module.add_metrics(lambda metrics: known | _derived(metrics, samples_itself))
        if trainer.is_global_zero:
            if "rollout/finished_fraction" in loader.metrics:
                self._say_fall(loader.metrics["rollout/finished_fraction"], batch.step)
            if trainer.global_step in self._steps:
                self._keep(data, batch.step)

    def _keep(self, data: RolloutData, step: int) -> None:
        """Write some responses of a step as text."""
        assert data.loader is not None
        some = data.loader.responses_of_step(step)[:KEPT]
        records = [sample_record(row.row_id, prompt_of(row), response, data.tokenizer) for row, response in some]
        write_samples(self._directory, step + 1, records)
        if self._tracker is not None:
            self._tracker.log_responses(records, step + 1)

    def _say_fall(self, finished_fraction: float, step: int) -> None:
        fall = self._watch.add(finished_fraction)
        if fall is not None:
            log.warning(
                "rollout/finished_fraction fell from %.2f to %.2f by optimiser step %d: the student stops ending its "
                "responses. Lower the delta weight or the scale of the loss, or lower optim.lr.",
                *fall,
                step,
            )


@final
class FallWatch:
    """Notices once that the mean of the latest values is well below that of the first."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._noticed = False

    def add(self, value: float) -> tuple[float, float] | None:
        """Add a value; return (the first mean, the latest) when the fall is noticed, else None."""
        self._latest.append(value)
        if len(self._first) < WINDOW:
            self._first.append(value)
            return None
        before, now = (sum(values) / len(values) for values in (self._first, self._latest))
        if self._noticed or now >= before - FALL:
            return None
        self._noticed = True
        return before, now

    def state_dict(self) -> dict[str, Any]:
        return {"first": list(self._first), "latest": list(self._latest), "noticed": self._noticed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first, self._noticed = list(state["first"]), state["noticed"]
        self._latest.extend(state["latest"])


def _derived(metrics: Mapping[str, float], samples_itself: bool) -> dict[str, float]:
    """Return metrics of the responses that follow from others.

    Args:
        metrics: of the optimiser step.
        samples_itself: True if all its labels were drawn from the student.
    """
    found = {}
    if "train/entropy" in metrics:
        found["rollout/entropy"] = metrics["train/entropy"]
    elif samples_itself and "train/ce" in metrics:
        # −log π_θ of tokens drawn from π_θ: an unbiased estimate of the entropy.
        found["rollout/entropy"] = metrics["train/ce"]
    if "train/advantage_square" in metrics:
        variance = metrics["train/advantage_square"] - metrics["train/advantage"] ** 2
        found["rollout/advantage_std"] = math.sqrt(max(0.0, variance))
    return found
