"""One run, from settings to summary: train, export, evaluate, record."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from deltakd.distributed.devices import choose_device
from deltakd.distributed.ranks import is_main_process, is_restarted, main_process_first
from deltakd.distributed.sharding import gathered, place, resident_bytes
from deltakd.evaluation.answers import evaluate_sets, shown
from deltakd.evaluation.measures import Measured, measure
from deltakd.evaluation.span_measures import SpanTeacher
from deltakd.evaluation.subject import Subject
from deltakd.io.files import write_text
from deltakd.io.run_directory import RunDirectory
from deltakd.models import ExportCheck, LanguageModel
from deltakd.models.identity import count_parameters, exported_parameters, trained_parameters
from deltakd.models.roles import open_exported
from deltakd.models.saving import save_student
from deltakd.references import LiveReferences, ServedReferences
from deltakd.tracking.environment import environment, peak_memory_mib
from deltakd.tracking.loggers import finish_loggers, make_loggers
from deltakd.tracking.model_card import CardFacts, model_card
from deltakd.tracking.wandb_run import origin_of, wandb_of
from deltakd.training.assembly import Parts, load_parts
from deltakd.training.callbacks import Lifeline
from deltakd.training.fit import Fitted, fit
from deltakd.training.inputs import changed_inputs
from deltakd.training.resume import read_state
from deltakd.training.settings import RESUME_POLICY, RunSettings
from deltakd.training.threads import choose_threads, threads_kept
from deltakd.types import STUDENT, TEACHER

log = logging.getLogger(__name__)


def run_training(settings: RunSettings, run_dir: Path, how_to_resume: str = "") -> float:
    """Train, export, evaluate and record; a finished run is only read.

    Args:
        settings: of the run.
        run_dir: the run directory.
        how_to_resume: how a user resumes; by default: the same command with this directory.

    Returns:
        The value of the objective at the best checkpoint.

    Raises:
        ConfigError: the directory holds another run.
        ValueError: data or models that can't be used or have changed since, or an export that is another student.
        NonFiniteLossError: the loss diverged.
        Stopped: SIGTERM or Ctrl-C came; the state is saved.
    """
    directory = RunDirectory(run_dir)
    claim: AbstractContextManager[None] = nullcontext()
    with main_process_first(f"claim of {run_dir}"):
        if is_main_process():
            claim = directory.claim(
                settings.record, resume=bool(settings.resume) or is_restarted(), policy=RESUME_POLICY
            )
    if directory.finished:
        log.info("%s is finished already; nothing to do.", run_dir)
        return _objective_value(settings, directory.read_summary())
    with Lifeline(how_to_resume or f"the same command with resume=true run_dir={run_dir}") as lifeline, threads_kept():
        return _run(settings, directory, claim, lifeline)


def _run(
    settings: RunSettings, directory: RunDirectory, claim: AbstractContextManager[None], lifeline: Lifeline
) -> float:
    main = is_main_process()
    started = time.perf_counter()
    card = _card_facts(settings, directory)
    with claim:
        parts = load_parts(settings, directory)
    choose_threads(settings.trainer, parts.models.loaded.values())
    state = read_state(directory)
    resume_step = state.step if state else 0
    loggers = _make_loggers(settings, directory, resume_step) if main else []
    tracker = wandb_of(loggers)
    failed = True
    try:
        if tracker is not None:
            tracker.log_origin(
                origin_of(settings.model, settings.data, settings.read_roles, parts.tokenizer, parts.sets)
            )
        fitted = fit(parts, loggers, state, lifeline)
        metrics = fitted.metrics
        if not main and place()[1] == 1:
            # Training was already done, so no ranks were joined: the main process does the rest alone.
            return _objective_value(settings, metrics)
        aligned = fitted.training_log.alignment
        summary: dict[str, Any] = {**metrics, **aligned, "meta": _meta(parts, fitted, started)}
        if main:
            _export(parts, fitted.student, model_card(card, summary))
        gathered("exported")
        scores, measured = _evaluate_student(parts)
        if not main:
            return _objective_value(settings, metrics)
        for logger in loggers:
            logger.log_metrics(scores, step=fitted.module.total_steps)
        summary = {
            **metrics,
            **aligned,
            **scores,
            "meta": _meta(parts, fitted, started) | {"measured": measured.counts},
        }
        write_text(directory.student / "README.md", model_card(card, summary))
        if tracker is not None:
            tracker.log_results(directory.student, metrics | scores, fitted.module.total_steps)
        failed = False
    finally:
        finish_loggers(loggers, failed)
        parts.close()
    directory.write_summary(summary)
    return _objective_value(settings, summary)


def _export(parts: Parts, student: LanguageModel, card: str) -> None:
    rows = parts.sets.train if parts.sets.val is None else parts.sets.val
    check = ExportCheck.on(rows, parts.settings.model, parts.vocabulary)
    save_student(student, parts.tokenizer, parts.directory.student, card, check)
    if parts.settings.model.lora is not None:
        from deltakd.models.adapters import save_adapter

        save_adapter(student.hf, parts.directory.adapter, parts.settings.specs[STUDENT])


def _make_loggers(settings: RunSettings, directory: RunDirectory, resume_step: int) -> list[Logger]:
    return make_loggers(settings.logger.values(), settings.name, settings.record, directory.path, resume_step)


def _card_facts(settings: RunSettings, directory: RunDirectory) -> CardFacts:
    return CardFacts(
        settings.name,
        settings.loss_name,
        settings.seed,
        settings.model,
        settings.data,
        settings.evaluation,
        settings.hyperparameters,
        settings.loss,
        Path.cwd(),
        directory.path.resolve(),
    )


def _objective_value(settings: RunSettings, summary: Mapping[str, Any]) -> float:
    return float(summary[settings.metric])


def _evaluate_student(parts: Parts) -> tuple[dict[str, float], Measured]:
    """Evaluate the exported student, opened as its users will open it: its answers and the other measures.

    Returns:
        All scores, and the measures among them.
    """
    settings = parts.settings
    sets = [] if parts.evaluation is None else parts.evaluation.sets
    if not sets and settings.evaluation.measures.rows == 0:
        return {}, Measured()
    device = choose_device(settings.trainer.accelerator, settings.trainer.devices)
    model = open_exported(parts.directory.student, settings.model, parts.vocabulary, device)
    # Measured first: it takes seconds, so errors show before the slower generation of answers.
    measured = measure(
        Subject(
            settings.model,
            settings.evaluation,
            settings.data,
            parts.tokenizer,
            parts.vocabulary,
            model,
            settings.reference,
            {
                role: loaded
                for role, loaded in parts.models.loaded.items()
                if role != STUDENT and parts.vocabularies.is_own(role)
            },
            show_progress=settings.trainer.enable_progress_bar,
            teacher=_span_teacher(parts, device),
            served=parts.models.references if isinstance(parts.models.references, ServedReferences) else None,
        ),
        parts.sets.val,
    )
    metrics = evaluate_sets(
        model,
        parts.tokenizer,
        sets,
        settings.evaluation,
        parts.vocabulary,
        parts.directory.generations,
        show_progress=settings.trainer.enable_progress_bar,
    )
    if metrics:
        log.info("%s: %s", settings.name, shown(metrics))
    return metrics | measured.scores, measured


def resident_mib(loaded: Mapping[str, LanguageModel]) -> dict[str, float]:
    """Return role -> MiB of its parameters on this rank; 0 for a role whose model is counted for an earlier one."""
    found: dict[str, float] = {}
    counted: set[int] = set()
    for role, model in sorted(loaded.items()):
        found[role] = 0.0 if id(model) in counted else round(resident_bytes(model) / 2**20, 3)
        counted.add(id(model))
    return found


def _span_teacher(parts: Parts, device: torch.device) -> SpanTeacher | None:
    """Return the teacher that has a tokenizer of its own, to measure the student against; None if there is none."""
    settings, other, references = parts.settings, parts.vocabularies.other, parts.models.references
    wanted = settings.evaluation.measures.rows != 0 and settings.evaluation.measures.references != "none"
    if other is None or parts.token_map is None or not wanted:
        return None
    if TEACHER in parts.models.loaded:
        if settings.reference.shards and place()[1] > 1:
            return None
        model = parts.models.loaded[TEACHER]
        references = LiveReferences({TEACHER: model}, placement=settings.reference.placement)
    if references is None or TEACHER not in references.roles:
        return None
    references.to(device)
    return SpanTeacher(references, settings.data.teachers_coding(other), parts.token_map)


def _meta(parts: Parts, fitted: Fitted, started: float) -> dict[str, Any]:
    """Return where the run ran, on what, and its costs; ``seconds`` covers this process, the others the run.

    Args:
        started: when this process began, by ``time.perf_counter``.
    """
    training = fitted.training_log
    return environment() | {
        "seed": parts.settings.seed,
        "objective": parts.settings.metric,
        "best_step": fitted.checkpoints.best_step,
        "steps": fitted.module.total_steps,
        # Cached references are not loaded, but the student learnt from them.
        "references": parts.settings.read_roles,
        "parameters": count_parameters(parts.models.loaded),
        "trained_parameters": trained_parameters(parts.models.student),
        "exported_parameters": exported_parameters(parts.models.student),
        "resident_mib": resident_mib(parts.models.loaded),
        "data_sha256": parts.sets.train.fingerprint,
        "changed_inputs": changed_inputs(parts.directory.path),
        "data": parts.sets.counts | fitted.streamed,
        "valid_tokens": training.valid_tokens,
        "training_seconds": round(training.seconds, 3),
        "rollouts": None if fitted.rollout_log is None else fitted.rollout_log.totals,
        "seconds": round(time.perf_counter() - started, 3),
        "tokens_per_second": round(training.tokens_per_second, 1),
        "peak_memory_mib": round(peak_memory_mib(), 1),
        "kernels": fitted.module.step.kernels.record(choose_device(parts.settings.trainer.accelerator)),
        "evaluation": None if parts.evaluation is None else parts.evaluation.record,
    }
