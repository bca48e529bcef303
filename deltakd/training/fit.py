"""Trains a run, from the start or from ``last.ckpt``, to the best student."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger

from deltakd.data.batches.data_module import DistillationData
from deltakd.data.encoding.example_stream import ExampleStream
from deltakd.distributed.ranks import is_main_process
from deltakd.distributed.strategies import check_ranks, count_ranks
from deltakd.evaluation import summarise
from deltakd.evaluation.answers import answer, make_set
from deltakd.evaluation.validation_answers import write_validation_answers
from deltakd.io.progress import write_total_steps
from deltakd.models import LanguageModel
from deltakd.models.tokenizers import pad_id
from deltakd.references import LiveReferences
from deltakd.rollouts.data import RolloutData
from deltakd.tracking.wandb_run import wandb_of
from deltakd.training.announce import announce_kernels, warn_of_own_labels
from deltakd.training.assembly import Parts, two_tokenizers
from deltakd.training.callbacks import (
    Checkpoints,
    Lifeline,
    RolloutLog,
    ShareAfterValidation,
    StopOnSignal,
    StreamEnd,
    TrainingLog,
    Validation,
)
from deltakd.training.callbacks.validation import Generate
from deltakd.training.module import DistillationModule
from deltakd.training.resume import SavedState, check_step_size, final_student, restore, restore_weights
from deltakd.training.trainer import make_trainer
from deltakd.types import STUDENT, TokenMap

log = logging.getLogger(__name__)

#: Share of a pass that the last step may take from the next pass without a log line.
BORROWED_SHARE = 0.1


@dataclass(frozen=True)
class Fitted:
    """A trained student and the facts of its training.

    Args:
        student: with the best weights, or the last ones if nothing was validated; whole on the main process.
        module: the trained module.
        checkpoints: the best step and its metrics.
        training_log: token counts and speed.
        streamed: counts of a stream's rows by outcome; empty for indexed data.
        rollout_log: the student's responses during training, and the time they took; None if it wrote none.
    """

    student: LanguageModel
    module: DistillationModule
    checkpoints: Checkpoints
    training_log: TrainingLog
    streamed: dict[str, int]
    rollout_log: RolloutLog | None

    @property
    def metrics(self) -> dict[str, float]:
        """Validation metrics of the best step; the last training loss if nothing was validated."""
        return dict(self.checkpoints.best_metrics) or {"train/loss": self.module.step_metrics["train/loss"]}


def fit(parts: Parts, loggers: list[Logger], state: SavedState | None, lifeline: Lifeline) -> Fitted:
    """Train; a resumed run continues from ``state``.

    Args:
        parts: of the run.
        loggers: of the main process.
        state: the checkpoint to resume from.
        lifeline: becomes a callback that joins the ranks.

    Raises:
        NonFiniteLossError: the loss diverged.
        Stopped: a signal came; the state is saved.
        ValueError: the checkpoint has another architecture, or another size of optimiser step.
    """
    settings = parts.settings.trainer
    ranks = count_ranks(settings.accelerator, settings.devices, settings.num_nodes)
    data = make_data(parts, ranks)
    validation = _make_validation(parts, data, loggers)
    stream_end = StreamEnd(validation)
    checkpoints = _make_checkpoints(parts, data, validation)
    training_log = TrainingLog(settings.log_every_n_steps)
    watching = [checkpoints, StopOnSignal(checkpoints)]
    rollout_log = _make_rollout_log(parts, data, training_log, loggers)
    kept: list[TrainingLog | StreamEnd | RolloutLog] = [training_log, stream_end]
    kept += [rollout_log] if rollout_log else []
    callbacks = [
        lifeline,
        stream_end,
        *([rollout_log] if rollout_log else []),
        training_log,
        *([validation] if validation else []),
        *([ShareAfterValidation(validation)] if validation and parts.settings.rollout.replay.adaptive else []),
        *watching,
    ]
    trainer = make_trainer(parts, callbacks, training_log, loggers)
    check_ranks(trainer, ranks)
    if is_main_process():
        write_total_steps(parts.directory.path, data.total_steps)
    if state:
        check_step_size(state, checkpoints, data)
    module = make_module(parts, data.total_steps)
    if state and state.step >= stream_end.saved_steps(state.content, data.total_steps):
        restore(module, (checkpoints, *kept), state)
    else:
        _announce(parts, data, state)
        announce_kernels(module.step.kernels, trainer.strategy.root_device)
        _train(trainer, module, data, state)
        if module.total_steps != data.total_steps and is_main_process():
            # For a stream, the last step is known only at its end.
            write_total_steps(parts.directory.path, module.total_steps)
    return Fitted(final_student(module, checkpoints), module, checkpoints, training_log, stream_end.counts, rollout_log)


def make_data(parts: Parts, ranks: int) -> DistillationData:
    """Make the data module of a run.

    Args:
        parts: of the run.
        ranks: number of processes that share an optimiser step.
    """
    settings = parts.settings.trainer
    if parts.settings.rollout.on_policy:
        assert parts.settings.data.batch_size is not None, "checked with the config"
        return RolloutData(
            parts.sets.train,
            parts.sets.val,
            tokenizer=parts.tokenizer,
            vocabulary=parts.vocabulary,
            settings=parts.settings.rollout,
            batch_size=parts.settings.data.batch_size,
            accumulate=settings.accumulate_grad_batches,
            seed=parts.settings.seed,
            max_epochs=settings.max_epochs,
            max_steps=settings.max_steps,
            longest=parts.settings.data.max_length,
            log_probs=parts.settings.loss.needs_sampled_tokens,
            pairs=parts.settings.loss.needs_pairs,
            weights_dir=parts.directory.path / "server_weights",
            world_size=ranks,
            references=parts.models.references if isinstance(parts.models.references, LiveReferences) else None,
            tokenizers=two_tokenizers(parts.settings, parts.tokenizer, parts.vocabularies),
        )
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
        world_size=ranks,
        stream=_start_stream(parts),
        packing=parts.settings.data.packing,
    )


def _start_stream(parts: Parts) -> ExampleStream[Any, Any] | None:
    if parts.sets.stream is None:
        return None
    stream = parts.sets.stream.start(parts.settings.seed)
    stream.vocabulary = parts.vocabulary
    return stream


def make_module(parts: Parts, total_steps: int) -> DistillationModule:
    """Make the LightningModule of a run."""
    settings = parts.settings
    if settings.loss.needs_alignment:
        assert parts.models.references is not None, "a loss that needs an alignment reads a teacher"
        heads = {**parts.models.references.empty_heads(), STUDENT: parts.models.student.empty_head()}
        settings.loss.prepare(heads, parts.token_map or TokenMap.identity(parts.vocabulary), settings.seed)
    return DistillationModule(
        parts.models.student,
        parts.models.references,
        settings.loss,
        settings.optim,
        total_steps,
        seed=settings.seed,
        kernels=settings.kernels.options(settings.trainer.precision),
        will_be_sharded=settings.strategy.shards_parameters,
        token_map=parts.token_map,
        router_aux_loss_coef=settings.model.router_aux_loss_coef,
    )


def _make_checkpoints(parts: Parts, data: DistillationData, validation: Validation | None) -> Checkpoints:
    settings = parts.settings.trainer
    return Checkpoints(
        parts.directory.checkpoints,
        validation,
        parts.settings.metric,
        parts.settings.metric_mode,
        data.step_size,
        settings.checkpoint_every_n_steps,
        settings.checkpoint_every_n_minutes,
    )


def _make_validation(parts: Parts, data: DistillationData, loggers: list[Logger]) -> Validation | None:
    if data.val is None:
        log.info("No validation data: the last student is exported, not the best.")
        return None
    settings = parts.settings.trainer
    steps = _validation_steps(data, settings.val_every_n_steps)
    generate = _make_generate(parts, loggers) if parts.settings.generates_on_validation else None
    return Validation(data.val_loader, steps, generate)


def _make_rollout_log(
    parts: Parts, data: DistillationData, training_log: TrainingLog, loggers: list[Logger]
) -> RolloutLog | None:
    """Return the callback of an on-policy run, which keeps responses of the validated steps."""
    if not isinstance(data, RolloutData):
        return None
    steps = _validation_steps(data, parts.settings.trainer.val_every_n_steps)
    return RolloutLog(training_log, parts.directory.path, steps, wandb_of(loggers))


def _validation_steps(data: DistillationData, every: int | None) -> frozenset[int]:
    """Return the steps to validate after: every ``every`` steps, or each pass's last; and the run's last."""
    chosen = range(every, data.total_steps + 1, every) if every else data.pass_ends
    return frozenset({*chosen, data.total_steps}) - {0}


def _make_generate(parts: Parts, loggers: list[Logger]) -> Generate:
    """Return a function that answers the first validation rows with the first seed, scores and keeps the answers."""
    evaluation = parts.settings.evaluation
    rows = parts.sets.val_rows[: evaluation.val_limit]
    asked = evaluation.prompts_of(parts.settings.data)
    val_set = make_set("val", rows, asked, parts.tokenizer, evaluation.val_scorer, **evaluation.comparison)
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


def _train(trainer: L.Trainer, module: DistillationModule, data: DistillationData, state: SavedState | None) -> None:
    if state:
        # Before Lightning does, so that a checkpoint of another architecture gives a clear message.
        restore_weights(module, state)
    with warnings.catch_warnings():
        # Lightning warns about deliberate choices: few loader workers, no validation loop.
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, datamodule=data, ckpt_path=state.path if state else None, weights_only=True)


def _announce(parts: Parts, data: DistillationData, state: SavedState | None) -> None:
    going_on = f"; going on from step {state.step}" if state else ""
    if parts.sets.stream is not None:
        shards = len(parts.sets.stream.shards)
        log.info(
            "%s: up to %d optimiser steps over a stream (shards: %d)%s.",
            parts.settings.name,
            data.total_steps,
            shards,
            going_on,
        )
        return
    if parts.settings.rollout.own_rows_alone:
        log.info(
            "%s: %d optimiser steps over %d prompts, which the student answers%s.",
            parts.settings.name,
            data.total_steps,
            len(parts.sets.train),
            going_on,
        )
        warn_of_own_labels(parts.settings.loss, parts.settings.rollout)
        return
    log.info(
        "%s: %d optimiser steps over %d rows with %d valid tokens a pass%s.",
        parts.settings.name,
        data.total_steps,
        len(parts.sets.train),
        int(parts.sets.train.valid_tokens.sum()),
        going_on,
    )
    rows, borrowed = len(parts.sets.train), data.borrowed_rows
    if borrowed > BORROWED_SHARE * rows:
        log.warning(
            "All steps are full: the last one of the first pass over %d rows takes %d rows of the next pass (%.0f %% "
            "of a pass). Smaller steps keep passes apart: data.batch_size or data.max_tokens_per_batch, "
            "trainer.accumulate_grad_batches.",
            rows,
            borrowed,
            100 * borrowed / rows,
        )
