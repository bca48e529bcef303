"""Trials of a search that end early: each validation is reported, and a trial with poor prospects is stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, final

import lightning as L
import optuna
from lightning.pytorch.callbacks import Checkpoint

from deltakd.training.callbacks import Validation
from deltakd.training.callbacks.steps import at_step_end

#: The trial that runs in this process, and its metric. Callbacks are built from a config, which can't hold a live
#: object.
_reporting: ContextVar[tuple[optuna.Trial, str] | None] = ContextVar("_reporting", default=None)


@contextmanager
def reporting_to(trial: optuna.Trial, metric: str) -> Iterator[None]:
    """Let training runs inside report to this trial.

    Args:
        trial: a running trial.
        metric: the metric to report, such as ``val/rougeL``.
    """
    token = _reporting.set((trial, metric))
    try:
        yield
    finally:
        _reporting.reset(token)


@final
class ReportToSearch(Checkpoint):
    """Reports each validation to the search, counted from 1, and ends the run if the search's pruner says so.

    It is a ``Checkpoint`` because Lightning runs those after all other callbacks: the step's validation is done.
    Outside a search it does nothing.

    Raises:
        optuna.TrialPruned: the trial should end here.
    """

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Report where this batch ended an optimiser step that was validated."""
        reporting = _reporting.get()
        validation = next((c for c in trainer.callbacks if isinstance(c, Validation)), None)  # type: ignore[attr-defined]
        step = trainer.global_step
        if reporting is None or validation is None or validation.last_step != step or not at_step_end(trainer):
            return
        trial, metric = reporting
        steps = sorted(validation.steps)
        number = steps.index(step) + 1
        held = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        # A run that was killed between the report and its checkpoint validates again.
        if number not in held:
            trial.report(validation.last_metrics[metric], number)
        if step != steps[-1] and trial.should_prune():
            raise optuna.TrialPruned(f"ended after {number} of {len(steps)} validations")
