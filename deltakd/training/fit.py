"""The training of a run: from the start or from ``last.ckpt``, to the best student."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from deltakd.data import InstructionData, TextData
from deltakd.data.batches.data_module import DistillationData
from deltakd.distributed.ranks import is_main_process
from deltakd.distributed.sharding import is_sharded
from deltakd.distributed.strategies import make_plugins, make_strategy
from deltakd.evaluation import summarise
from deltakd.evaluation.answers import answer, make_set
from deltakd.evaluation.validation_answers import write_validation_answers
from deltakd.io.progress import current_display, write_total_steps
from deltakd.io.run_directory import RunDirectory
from deltakd.models import LanguageModel
from deltakd.models.tokenizers import pad_id
from deltakd.tracking.wandb_run import wandb_of
from deltakd.training.assembly import Parts
from deltakd.training.callbacks import (
    Checkpoints,
    DisplayedTraining,
    Lifeline,
    ProgressBar,
    StopOnSignal,
    TrainingLog,
    Validation,
)
from deltakd.training.callbacks.checkpoints import read_checkpoint
from deltakd.training.callbacks.validation import Generate
from deltakd.training.module import DistillationModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedState:
    """What a former start of the run has saved.

    Args:
        path: the checkpoint.
        content: all of it, but for the shards of a sharded one.
    """

    path: Path
    content: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.content["global_step"])


@dataclass(frozen=True)
class Fitted:
    """A trained student and what is known of its training.

    Args:
        student: with the best weights, or the last ones where nothing was validated; whole on the main process.
        module: what was trained.
        checkpoints: which step was best, and its metrics.
        training_log: what was trained on, and how fast.
    """

    student: LanguageModel
    module: DistillationModule
    checkpoints: Checkpoints
    training_log: TrainingLog

    @property
    def metrics(self) -> dict[str, float]:
        """Validation metrics of the best step; the last training loss where nothing was validated."""
        return dict(self.checkpoints.best_metrics) or {"train/loss": self.module.step_metrics["train/loss"]}


def read_state(directory: RunDirectory) -> SavedState | None:
    """The newest checkpoint that is as it was written, or None where the run has not saved anything yet.

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
            log.warning("%s. The run goes on from the one before it, step %d.", damage[0], state.step)
        return state
    if damage:
        raise ValueError(f"{'; '.join(damage)}: remove {directory.checkpoints} to start again")
    return None


def fit(parts: Parts, loggers: list[Logger], state: SavedState | None, lifeline: Lifeline) -> Fitted:
    """Train; what a former start of the same run has done is not done again.

    Args:
        parts: of the run.
        loggers: of the main process.
        state: what to go on from.
        lifeline: is tied to the ranks.

    Raises:
        NonFiniteLossError: the loss diverged.
        Stopped: a signal came; the state is saved.
        ValueError: the checkpoint is of another architecture.
    """
    settings = parts.settings.trainer
    data = make_data(parts)
    validation = _make_validation(parts, data, loggers)
    checkpoints = Checkpoints(
        parts.directory.checkpoints,
        validation,
        parts.settings.metric,
        parts.settings.metric_mode,
        settings.checkpoint_every_n_steps,
        settings.checkpoint_every_n_minutes,
    )
    training_log = TrainingLog(settings.log_every_n_steps)
    watching = [checkpoints, StopOnSignal(checkpoints)]
    callbacks = [lifeline, training_log, *([validation] if validation else []), *watching]
    trainer = _make_trainer(parts, callbacks, loggers)
    # How many steps there are depends on the number of ranks, which only the trainer knows.
    data.trainer = trainer
    training_log.total_steps = checkpoints.total_steps = data.total_steps
    if is_main_process():
        write_total_steps(parts.directory.path, data.total_steps)
    if validation is not None:
        validation.steps = _validation_steps(data, settings.val_every_n_steps)
    checkpoints.step_size = data.step_size
    if state:
        _check_ranks(state.content["callbacks"][checkpoints.state_key], checkpoints, parts.settings.data)
    module = make_module(parts, data.total_steps)
    if state and state.step >= data.total_steps:
        _restore(module, (checkpoints, training_log), state.content)
    else:
        _announce(parts, data, state)
        if state and "state_dict" in state.content:
            # Before Lightning does: a checkpoint of another architecture deserves a sentence, not a traceback.
            _load_weights(module, state.content)
        with warnings.catch_warnings():
            # Lightning warns of what is on purpose here: few loader workers, no validation loop of its own.
            warnings.filterwarnings("ignore", module="lightning")
            trainer.fit(module, datamodule=data, ckpt_path=state.path if state else None, weights_only=True)
    return Fitted(_final_student(module, checkpoints), module, checkpoints, training_log)


def _check_ranks(saved: Mapping[str, Any], checkpoints: Checkpoints, data: InstructionData | TextData) -> None:
    """Whether a checkpoint can go on with these ranks; ``saved`` is the state of ``checkpoints`` in it."""
    if saved["step_size"] != checkpoints.step_size:
        key, unit = ("batch_size", "rows") if data.batch_size else ("max_tokens_per_batch", "positions")
        raise ValueError(
            f"the checkpoint was made with {saved['step_size']} {unit} in an "
            f"optimiser step over all processes, and this start has {checkpoints.step_size}: with another number of "
            f"processes change data.{key}, so that their product stays the same"
        )


def _final_student(module: DistillationModule, checkpoints: Checkpoints) -> LanguageModel:
    """The best student, or the last where nothing was validated."""
    if not checkpoints.best_path.is_file() or not is_main_process():
        return module.student
    best = read_checkpoint(checkpoints.best_path)
    if module.shell is not None and is_sharded(module.student):
        return module.shell.load({name.removeprefix("student."): t for name, t in best["state_dict"].items()})
    _load_weights(module, best)
    return module.student


def make_data(parts: Parts) -> DistillationData:
    """The batches of a run, in their order."""
    settings = parts.settings.trainer
    return DistillationData(
        parts.sets.train,
        parts.sets.val,
        pad_id=pad_id(parts.tokenizer, parts.vocabulary),
        batch_size=parts.settings.data.batch_size,
        accumulate=settings.accumulate_grad_batches,
        seed=parts.settings.seed,
        max_epochs=settings.max_epochs,
        max_steps=settings.max_steps,
        max_tokens=parts.settings.data.max_tokens_per_batch,
    )


def make_module(parts: Parts, total_steps: int) -> DistillationModule:
    """Student, references and loss of a run as Lightning wants them."""
    settings = parts.settings
    return DistillationModule(
        parts.models.student,
        parts.models.references,
        settings.loss,
        settings.optim,
        total_steps,
        seed=settings.seed,
        memory_budget=settings.kernels.memory_budget,
        will_be_sharded=settings.strategy.shards_parameters,
    )


def _make_validation(parts: Parts, data: DistillationData, loggers: list[Logger]) -> Validation | None:
    if data.val is None:
        log.info("No validation data: the last student is exported, not the best.")
        return None
    generate = _make_generate(parts, loggers) if parts.settings.generates_on_validation else None
    return Validation(data.val_loader, frozenset(), generate)


def _make_generate(parts: Parts, loggers: list[Logger]) -> Generate:
    """Answers to the first validation rows under the first sampling seed, scored, and kept."""
    evaluation = parts.settings.evaluation
    rows = parts.sets.val_rows[: evaluation.val_limit]
    val_set = make_set("val", rows, evaluation.prompts_of(parts.settings.data), parts.tokenizer, evaluation.val_scorer)
    seed = evaluation.seeds[0]
    tracker = wandb_of(loggers)

    def generate(module: DistillationModule) -> dict[str, float]:
        with module.whole_student() as student:
            records = answer(student.hf, parts.tokenizer, val_set, evaluation, [seed], parts.vocabulary, False)[seed]
        step = module.trainer.global_step
        if is_main_process():
            write_validation_answers(parts.directory.path, step, records)
        if tracker is not None:
            tracker.log_validation_answers(step)
        return summarise({seed: records})

    return generate


def _validation_steps(data: DistillationData, every: int | None) -> frozenset[int]:
    """Every so many steps, or at the end of each pass; and after the last step."""
    if every:
        chosen = [round(every * (k + 1)) for k in range(int(data.total_steps / every))]
    else:
        chosen = data.sampler().pass_ends
    return frozenset({*chosen, data.total_steps}) - {0}


def _make_trainer(parts: Parts, callbacks: list[L.Callback], loggers: list[Logger]) -> L.Trainer:
    run, settings = parts.settings, parts.settings.trainer
    display = current_display()
    if display is not None:
        callbacks = [*callbacks, DisplayedTraining(display)]
    elif settings.enable_progress_bar:
        callbacks = [*callbacks, ProgressBar(run.name.rsplit("/", 1)[-1])]
    return L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        precision=settings.precision,
        strategy=make_strategy(run.strategy),
        plugins=make_plugins(run.strategy),
        # Training is one stream of micro-batches whose length is known (data/sampler.py): one epoch to Lightning.
        max_epochs=1,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=loggers or False,
        callbacks=[*run.callbacks.values(), *callbacks],
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=settings.enable_progress_bar and display is None,
        profiler=_make_profiler(settings.profiler, parts.directory.path),
        detect_anomaly=settings.detect_anomaly,
        default_root_dir=parts.directory.path,
    )


def _make_profiler(name: str | None, directory: Path) -> Profiler | None:
    """Lightning's profilers, writing ``fit-profile.txt`` into the run directory."""
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return None if name is None else kinds[name](dirpath=directory, filename="profile")


def _announce(parts: Parts, data: DistillationData, state: SavedState | None) -> None:
    log.info(
        "%s: %d optimiser steps over %d rows with %d valid tokens a pass%s.",
        parts.settings.name,
        data.total_steps,
        len(parts.sets.train),
        int(parts.sets.train.valid_tokens.sum()),
        f"; going on from step {state.step}" if state else "",
    )


def _restore(module: DistillationModule, callbacks: Sequence[Checkpoints | TrainingLog], state: dict[str, Any]) -> None:
    """Take over the state of a run whose training is done, without a trainer that has nothing left to do."""
    if "state_dict" in state:
        _load_weights(module, state)
    module.on_load_checkpoint(state)
    for callback in callbacks:
        callback.load_state_dict(state["callbacks"][callback.state_key])


def _load_weights(module: DistillationModule, state: dict[str, Any]) -> None:
    """Load a state dict; tied weights and buffers may be absent, as they are where a sharded student was saved."""
    tensors: dict[str, torch.Tensor] = state["state_dict"]
    wanted = {name for name, p in module.named_parameters() if p.requires_grad or module.strict_loading}
    absent, foreign = sorted(wanted - set(tensors)), sorted(set(tensors) - set(module.state_dict()))
    problem = f"it has no {absent[0]}" if absent else f"it has {foreign[0]}" if foreign else ""
    try:
        module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
    if problem:
        raise ValueError(
            f"the checkpoint is of another architecture than model.student ({problem}); give the same model, or "
            "another run_dir"
        )
