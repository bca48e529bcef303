"""Evaluate a student: ``python -m deltakd.evaluate run=DIR`` or ``model=DIR``, with overrides as in training."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from deltakd.cli import guarded, make_parser, parse
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from deltakd.data import DataConfig, EncodedSet, Row
    from deltakd.evaluation.span_measures import SpanTeacher
    from deltakd.training.settings import RunSettings

log = logging.getLogger(__name__)

USAGE = """Evaluate a student on any set of files.

  python -m deltakd.evaluate run=RUN_DIR [key=value ...]
  python -m deltakd.evaluate model=MODEL_DIR_OR_HUB_ID [key=value ...]

With run=, the sets, decoding options, template and lengths are those of that run unless an override says otherwise:
  'evaluation.sets={mine: FILE.jsonl.gz}'  evaluation.limit=50  'evaluation.seeds=[10,20]'
  evaluation.decoding.do_sample=false  data.template=chat  data.max_prompt_length=256  run_dir=WHERE_RESULTS_GO
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("evaluate", USAGE)
    parser.add_argument("overrides", nargs="+", help="run=..., model=..., and Hydra overrides")
    arguments = parse(parser, argv)
    guarded(lambda: run_evaluation(arguments.overrides), "the same command; sets that are done are not done again")


def run_evaluation(arguments: Sequence[str]) -> dict[str, Any]:
    """Evaluate and write ``config.yaml``, ``generations/`` and ``summary.json`` into ``run_dir``.

    Raises:
        ConfigError: neither or both of run and model given, unknown keys, no sets, or sets that can't be evaluated.
        ValueError: a model or a file that can't be read.
    """
    cfg, model_path = _configure(arguments)
    # These import torch and all models; --help and a mistyped key should not wait for them.
    from deltakd.config.build import make_evaluation_settings
    from deltakd.distributed.devices import choose_device
    from deltakd.evaluation.answers import evaluate_sets, shown
    from deltakd.evaluation.measures import measure
    from deltakd.evaluation.sets import read_checked_sets
    from deltakd.evaluation.subject import Subject
    from deltakd.models import ModelSpec, load_config, load_tokenizer
    from deltakd.models.identity import count_parameters, model_fingerprint
    from deltakd.models.roles import open_exported
    from deltakd.models.vocabulary import vocabulary_of
    from deltakd.tracking.environment import environment, peak_memory_mib
    from deltakd.training.settings import RESUME_POLICY

    settings = make_evaluation_settings(cfg)
    evaluation, data, trust = settings.evaluation, settings.data, settings.model.trust_remote_code
    started = time.perf_counter()
    tokenizer = load_tokenizer(model_path, "model", trust_remote_code=trust)
    student = load_config("student", ModelSpec(path=model_path), trust_remote_code=trust)
    vocabulary = vocabulary_of(tokenizer, student)
    checked = read_checked_sets(evaluation, settings.deviations, data, tokenizer, student, _train_rows(data))
    directory = RunDirectory(Path(settings.run_dir or f"outputs/evaluate/{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    evaluated = {"evaluated_model": model_path, "evaluated_model_sha256": model_fingerprint(model_path)}
    claim = directory.claim(evaluated | dict(settings.record), resume=directory.config.is_file(), policy=RESUME_POLICY)
    with claim:
        model = open_exported(model_path, settings.model, vocabulary, choose_device(settings.trainer.accelerator))
    measures = evaluation.measures
    teacher = _span_teacher(settings, tokenizer, vocabulary, model) if measures.rows != 0 else None
    subject = Subject(
        settings.model, evaluation, data, tokenizer, vocabulary, model, settings.reference, teacher=teacher
    )
    measured = measure(subject, _validation(data, tokenizer, teacher) if measures.rows != 0 else None)
    metrics = evaluate_sets(model, tokenizer, checked.sets, evaluation, vocabulary, directory.generations)
    metrics |= measured.scores
    meta = environment() | {
        "model": model_path,
        "seed": settings.seed,
        "parameters": count_parameters({"student": model}),
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory_mib": round(peak_memory_mib(), 1),
        "measured": measured.counts,
        "evaluation": checked.record,
    }
    summary = {**metrics, "meta": meta}
    directory.write_summary(summary)
    log.info("%s (%s)", shown(metrics), directory.path)
    return summary


def _configure(arguments: Sequence[str]) -> tuple[DictConfig, str]:
    """Return the config (the base, then the run's own settings, then the command line) and the model's path."""
    sources = dict(a.split("=", 1) for a in arguments if a.startswith(("run=", "model=")))
    overrides = [a for a in arguments if not a.startswith(("run=", "model="))]
    if len(sources) != 1:
        raise ConfigError([f"give either run=<run dir> or model=<checkpoint dir>; given: {list(arguments)}"])
    cfg = compose_config("train", overrides)
    OmegaConf.set_struct(cfg, False)
    if "model" in sources:
        return cfg, sources["model"]
    run = RunDirectory(Path(sources["run"]))
    if not run.config.is_file() or not run.student.is_dir():
        raise ConfigError(
            [f"run={run.path} is not a finished run: it needs config.yaml and student/; or give model=<dir>"]
        )
    held = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    chosen = {a.split("=", 1)[0] for a in overrides}
    for group in ("model", "data", "reference"):
        if group not in chosen:
            cfg[group] = held[group]
    if "evaluation" not in chosen:
        # A run of an earlier version lacks the newer keys.
        cfg.evaluation = OmegaConf.merge(cfg.evaluation, held["evaluation"])
    # A run without generation still knows its sets and decoding; asking for an evaluation asks for answers.
    cfg.evaluation.generate = True
    for override in OverridesParser.create().parse_overrides(overrides):
        if "." in override.key_or_group:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=False)
    return cfg, str(run.student)


def _span_teacher(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, vocabulary: int, student: nn.Module
) -> SpanTeacher | None:
    """Return the teacher if it has a tokenizer of its own; one that can't be opened does not stop the evaluation."""
    from deltakd.evaluation.span_measures import open_span_teacher
    from deltakd.types import device_of

    if settings.evaluation.measures.references == "none":
        return None
    try:
        device = device_of(student)
        return open_span_teacher(settings.model, settings.data, tokenizer, vocabulary, device)
    except (ValueError, OSError) as error:
        log.warning("The student is not measured against its teacher: %s", error)
        return None


def _validation(data: DataConfig, tokenizer: PreTrainedTokenizerBase, teacher: SpanTeacher | None) -> EncodedSet | None:
    """Return the validation rows of the data group, if any; missing rows do not stop the evaluation."""
    if not (data.train and data.validates):
        return None
    try:
        data.make_files()
        return data.load(tokenizer, teachers=None if teacher is None else teacher.coding.tokenizer).val
    except (ValueError, OSError) as error:
        log.warning("The validation rows can't be read, so nothing is measured on them: %s", error)
        return None


def _train_rows(data: DataConfig) -> Sequence[Row] | None:
    """Return the rows that the run was trained on; None if they can no longer be read."""
    from deltakd.data import InstructionData

    if not isinstance(data, InstructionData) or not data.train:
        return None
    if data.streaming:
        log.info("Whether rows were trained on is not checked: the training data is streamed.")
        return None
    try:
        return data.split().train
    except ValueError as error:
        log.warning("Whether rows were trained on is not checked, since the training data can't be read: %s", error)
        return None


if __name__ == "__main__":
    main()
