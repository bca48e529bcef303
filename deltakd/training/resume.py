"""Resuming a run: reading the saved state, and restoring the weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltakd.data.batches.data_module import DistillationData
from deltakd.distributed.ranks import is_main_process
from deltakd.distributed.sharding import is_sharded
from deltakd.io.run_directory import RunDirectory
from deltakd.models import LanguageModel
from deltakd.training.callbacks import Checkpoints, RolloutLog, StreamEnd, TrainingLog
from deltakd.training.callbacks.checkpoints import read_checkpoint
from deltakd.training.module import DistillationModule
from deltakd.training.step import DistillationStep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedState:
    """A checkpoint of an earlier start of the run.

    Args:
        path: the checkpoint.
        content: all of it, except the shards of a sharded one.
    """

    path: Path
    content: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.content["global_step"])


def read_state(directory: RunDirectory) -> SavedState | None:
    """Read the newest undamaged checkpoint; None if the run has not saved one yet.

    Raises:
        ValueError: both checkpoints are damaged.
    """
    damage: list[str] = []
    for path in (directory.last_checkpoint, directory.previous_checkpoint):
        if not path.exists():
            continue
        try:
            state = SavedState(path, read_checkpoint(path))
        except ValueError as error:
            damage.append(str(error))
            continue
        if damage:
            log.warning("%s. The run continues from the one before it, step %d.", damage[0], state.step)
        return state
    if damage:
        raise ValueError(f"{'; '.join(damage)}: remove {directory.checkpoints} to start again")
    return None


def check_step_size(state: SavedState, checkpoints: Checkpoints, data: DistillationData) -> None:
    """Compare the optimiser step's size over all ranks with the checkpoint's.

    Raises:
        ValueError: they differ, so these ranks can't resume the checkpoint.
    """
    saved = state.content["callbacks"][checkpoints.state_key]
    if saved["step_size"] != data.step_size:
        key, unit = ("batch_size", "rows") if data.batch_size else ("max_tokens_per_batch", "positions")
        raise ValueError(
            f"the checkpoint was made with {saved['step_size']} {unit} in an "
            f"optimiser step over all processes, and this start has {data.step_size}: with another number of "
            f"processes change data.{key}, so that their product stays the same"
        )


def restore(
    module: DistillationModule,
    callbacks: Sequence[Checkpoints | TrainingLog | StreamEnd | RolloutLog],
    state: SavedState,
) -> None:
    """Restore the state of a run that has finished training, without a trainer."""
    restore_weights(module, state)
    module.on_load_checkpoint(state.content)
    for callback in callbacks:
        callback.load_state_dict(state.content["callbacks"][callback.state_key])


def restore_weights(module: DistillationModule, state: SavedState) -> None:
    """Load a checkpoint's weights, unless it is sharded: then only its strategy can read it.

    Raises:
        ValueError: it is of another architecture.
    """
    if "state_dict" in state.content:
        _load(module, state.content["state_dict"], module.strict_loading)


def final_student(module: DistillationModule, checkpoints: Checkpoints) -> LanguageModel:
    """Return the best student, or the last if nothing was validated; whole on the main process."""
    if not checkpoints.best_path.is_file() or not is_main_process():
        return module.student
    best: dict[str, torch.Tensor] = read_checkpoint(checkpoints.best_path)["state_dict"]
    if module.shell is not None and is_sharded(module.student):
        return module.shell.load(
            {name.removeprefix("student."): value for name, value in best.items() if name.startswith("student.")}
        )
    _load(module.step, best, module.strict_loading)
    return module.student


def _load(target: DistillationModule | DistillationStep, state: dict[str, torch.Tensor], strict: bool) -> None:
    """Load a state dict; tied weights and buffers may be absent, as in the state of a sharded student."""
    wanted = {name for name, p in target.named_parameters() if p.requires_grad or strict}
    absent, foreign = sorted(wanted - set(state)), sorted(set(state) - set(target.state_dict()))
    problem = f"it has no {absent[0]}" if absent else f"it has {foreign[0]}" if foreign else ""
    try:
        target.load_state_dict(state, strict=False)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
    if problem:
        raise ValueError(
            f"the checkpoint is of another architecture than model.student ({problem}); give the same model, or "
            "another run_dir"
        )
