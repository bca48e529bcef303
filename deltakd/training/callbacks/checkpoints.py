"""Checkpoints: the latest state, for resuming, and the best student.

``last.ckpt`` is a file, or a directory if the strategy shards (each rank writes its part). It is written under another
name and renamed once complete; the one before is kept as ``previous.ckpt``, in case the disk damages the newer one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from deltakd.distributed.sharding import is_sharded, on_any_rank
from deltakd.distributed.zero import META, ZeroStrategy
from deltakd.io.errors import ServerError
from deltakd.io.files import remove, replacing, telling
from deltakd.io.run_directory import LAST, PREVIOUS
from deltakd.references import ServedReferences
from deltakd.training.callbacks.steps import at_step_end
from deltakd.training.callbacks.validation import Validation
from deltakd.training.module import DistillationModule

log = logging.getLogger(__name__)

#: In a sharded checkpoint: file -> bytes.
SIZES = "sizes.json"
BEST = "best.ckpt"


@final
class Checkpoints(Checkpoint):
    """Saves ``last.ckpt`` (everything needed to resume) and ``best.ckpt`` (the student with the best objective).

    Both are written at the end of an optimiser step, after that step's validation if there is one, so that
    a resumed run never has to repeat or skip a validation.

    Args:
        directory: where the files go.
        validation: its metrics decide which student is best; None: only ``last.ckpt``.
        objective: name of the metric, such as ``val/rougeL``. Ties go to the lower ``val/ce``, then to the earlier
            step.
        mode: ``max`` or ``min``.
        step_size: rows (or positions) per optimiser step over all ranks; saved, for a resumed run to compare with.
        every_n_steps: optimiser steps between two saves of ``last.ckpt``; None: only by time.
        every_n_minutes: minutes between two saves of ``last.ckpt``.
    """

    def __init__(
        self,
        directory: Path,
        validation: Validation | None,
        objective: str,
        mode: str,
        step_size: int,
        every_n_steps: int | None = None,
        every_n_minutes: float = 10.0,
    ) -> None:
        self.directory = directory
        self.validation = validation
        self.objective = objective
        self.mode = mode
        self.step_size = step_size
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.best_metrics: dict[str, float] = {}
        self.best_step: int | None = None
        self._saved_at = time.monotonic()
        #: Optimiser steps done in ``last.ckpt``; 0 if there is none.
        self._saved_step = 0
        #: How far the loops were at the end of the last whole step; kept if a server may break off the next one.
        self._whole: tuple[int, dict[str, Any]] | None = None
        self._rewinds = False

    @property
    def last_path(self) -> Path:
        """The checkpoint to resume from."""
        return self.directory / LAST

    @property
    def _partial(self) -> Path:
        return self.directory / f"{LAST}.partial"

    @property
    def best_path(self) -> Path:
        """The weights of the best student; absent if nothing was validated."""
        return self.directory / BEST

    def state_dict(self) -> dict[str, Any]:
        """Return the best step, its metrics and the step size."""
        return {
            "best_metrics": self.best_metrics,
            "best_step": self.best_step,
            "step_size": self.step_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_metrics = state_dict["best_metrics"]
        self.best_step = state_dict["best_step"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that the step the run resumes from is saved."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save at the end of an optimiser step if due; the last step of the run is always saved."""
        step = trainer.global_step
        if not at_step_end(trainer):
            return
        assert isinstance(pl_module, DistillationModule)
        is_last = step == pl_module.total_steps
        validated = self.validation is not None and self.validation.last_step == step
        if validated or is_last:
            pl_module.settle()
        if validated:
            self._keep_best(trainer)
        elif self.validation is None and is_last and is_sharded(pl_module):
            # Once training is over, no rank can gather the student any more.
            self._save_student(trainer)
        by_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        by_time = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        # Saving is collective, and the ranks' clocks differ.
        if validated or by_steps or is_last or on_any_rank(by_time):
            self.save_last(trainer)
        if isinstance(pl_module.step.references, ServedReferences):
            self._whole = (step, trainer.fit_loop.state_dict())

    def save_last(self, trainer: L.Trainer) -> None:
        """Flush the loggers, since a resumed run logs only later steps; then write ``last.ckpt``.

        Raises:
            WriteError: the disk failed; the old checkpoints are kept.
        """
        partial = self._partial
        if trainer.is_global_zero:
            remove(partial)
        trainer.strategy.barrier()
        step = trainer.global_step
        kept = f"the checkpoint of step {self._saved_step}" if self._saved_step else ""
        with telling(f"the checkpoint of step {step}", self.directory, kept):
            for logger in trainer.loggers:
                logger.save()
            trainer.save_checkpoint(partial)
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                _seal(partial)
        if trainer.is_global_zero:
            if self.last_path.exists():
                remove(self.directory / PREVIOUS)
                os.replace(self.last_path, self.directory / PREVIOUS)
            os.replace(partial, self.last_path)
        trainer.strategy.barrier()
        self._saved_at, self._saved_step = time.monotonic(), step

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Delete a half-written checkpoint; save the state if a server failed.

        One that writes rollouts does so between steps, on all ranks. One of references breaks off a step, or a
        validation, which is begun again after resuming; of several ranks, others may be in the middle of it.
        Any rank may have failed. Lifeline's hook runs first, so no other rank is writing any more.
        """
        remove(self._partial)
        if not isinstance(exception, ServerError) or trainer.global_step <= self._saved_step:
            return
        assert isinstance(pl_module, DistillationModule)
        if isinstance(pl_module.step.references, ServedReferences):
            alone = trainer.world_size == 1 and not isinstance(trainer.strategy, ZeroStrategy)
            # The weights are those of the last whole step; where its validation broke off, it has no such state.
            self._rewinds = alone and self._whole is not None and self._whole[0] == trainer.global_step
            if not self._rewinds:
                log.warning("Training goes on from the checkpoint of step %d.", self._saved_step)
                return
        self.save_last(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save a step that a server broke off as one that has not begun."""
        if self._rewinds:
            assert self._whole is not None
            checkpoint["loops"]["fit_loop"] = self._whole[1]

    def _keep_best(self, trainer: L.Trainer) -> None:
        assert self.validation is not None
        metrics = self.validation.last_metrics
        score = metrics[self.objective]
        if math.isfinite(score) and (not self.best_metrics or self._rank(metrics) < self._rank(self.best_metrics)):
            self.best_metrics, self.best_step = dict(metrics), trainer.global_step
            self._save_student(trainer)

    def _rank(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        """Return a key that is lower for the better student: the objective, then the CE to break ties (scores of 0).

        If a user's loss has no part ``ce``, the loss itself breaks ties.
        """
        score = metrics[self.objective]
        return (-score if self.mode == "max" else score, metrics.get("val/ce", metrics.get("val/loss", math.inf)))

    def _save_student(self, trainer: L.Trainer) -> None:
        assert isinstance(trainer.lightning_module, DistillationModule)
        state = trainer.lightning_module.whole_state()
        if trainer.is_global_zero:
            with (
                replacing(self.best_path, f"the best student, that of step {trainer.global_step},") as partial,
                partial.open("wb") as file,
            ):
                torch.save({"state_dict": state, "global_step": trainer.global_step}, file)


def _seal(path: Path) -> None:
    """Record the file sizes of a sharded checkpoint, so that a missing or short file is noticed."""
    if path.is_dir():
        sizes = {str(f.relative_to(path)): f.stat().st_size for f in sorted(path.rglob("*")) if f.is_file()}
        (path / SIZES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint's content, without shards, on the CPU; only tensors and plain values are allowed.

    Raises:
        ValueError: it is damaged.
    """
    try:
        if path.is_dir():
            sizes: dict[str, int] = json.loads((path / SIZES).read_text(encoding="utf-8"))
            for name, size in sizes.items():
                found = (path / name).stat().st_size
                if found != size:
                    raise ValueError(f"{name} has {found} bytes instead of {size}")
            path = path / META
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} can't be read ({first[:150]}); remove it to start again") from None
