"""A run in which the teacher answers the training prompts."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from deltakd.data import InstructionData
from deltakd.distributed.devices import choose_device
from deltakd.evaluation.teacher_answers import Answering, answer_prompts, answering_record
from deltakd.io.run_directory import RunDirectory
from deltakd.models.identity import model_version
from deltakd.models.roles import open_tokenizer, open_vocabularies
from deltakd.tracking.environment import costs_since, environment
from deltakd.training.announce import warn_of_verbatim_prompts
from deltakd.training.assembly import open_role
from deltakd.training.image_check import check_image_models
from deltakd.training.settings import RESUME_POLICY, RunSettings
from deltakd.types import TEACHER

log = logging.getLogger(__name__)


def run_answers(settings: RunSettings, run_dir: Path) -> dict[str, Any]:
    """Let the teacher answer every prompt that a training run with these settings would train on.

    The prompts are those of ``data`` (with its exclusions, subset and limit, without held-out validation rows),
    tokenised as in training; a teacher with another tokenizer reads them in its own template. Decoding follows
    ``evaluation.decoding`` with the first of ``evaluation.seeds``. In a conversation only the last answer is replaced;
    earlier answers stay.

    Writes to ``run_dir``: ``answers/`` (every answer; existing ones are kept), ``train.jsonl`` (the rows with new
    answers, without those that are empty or lack EOS), ``val.jsonl`` (the rows held out by ``data.val_size``,
    unchanged) and finally ``summary.json``. A finished directory is only read.

    Args:
        settings: of the run.
        run_dir: the directory.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigError: the directory holds something else.
        ValueError: data or models that can't be used, or no answer is left.
    """
    directory = RunDirectory(run_dir)
    teacher = str(settings.specs[TEACHER].path)
    answering = {"answering_teacher": model_version(teacher)} | dict(settings.record)
    claim = directory.claim(answering, resume=directory.config.is_file(), policy=RESUME_POLICY)
    if directory.finished:
        log.info("%s is finished already; nothing to do.", run_dir)
        return directory.read_summary()
    started = time.perf_counter()
    with claim:
        parts = _load(settings, teacher, directory)
    counts, speed = answer_prompts(parts, directory.path, holds_out=settings.data.val is None)
    # Only this start's costs: earlier ones are unknown.
    costs = costs_since(started, speed)
    summary = counts | {"meta": environment() | answering_record(parts) | costs}
    directory.write_summary(summary)
    return summary


def _load(settings: RunSettings, path: str, directory: RunDirectory) -> Answering:
    data = settings.data
    assert isinstance(data, InstructionData)
    data.make_files()
    tokenizer = open_tokenizer(settings.model, directory.path / "tokenizer")
    # A teacher with another tokenizer answers in its own: only its text goes on.
    vocabularies = open_vocabularies(settings.model, settings.specs, tokenizer, aligns=True)
    rows = data.read(tokenizer)
    check_image_models(settings, rows.train, tokenizer)
    warn_of_verbatim_prompts(data, rows.train)
    teacher = open_role(settings, TEACHER, tokenizer, vocabularies).to(choose_device(settings.trainer.accelerator))
    shown = settings.trainer.enable_progress_bar
    asked = data if vocabularies.other is None else data.for_teachers()
    its_tokenizer = vocabularies.other or tokenizer
    return Answering(path, asked, settings.evaluation, rows, its_tokenizer, vocabularies.of(TEACHER), teacher, shown)
