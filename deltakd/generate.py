"""Sequence-level KD's data: ``python -m deltakd.generate experiment=kd_gpt2 [key=value ...]`` (arXiv 1606.07947)."""

from __future__ import annotations

import argparse
import logging
import shlex
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from deltakd.config.build import make_answering_settings
from deltakd.config.compose import compose_config
from deltakd.data import InstructionData
from deltakd.evaluation.teacher_answers import (
    TRAIN_FILE,
    VAL_FILE,
    Answering,
    answer_prompts,
    answering_record,
    version_of,
)
from deltakd.io.errors import guarded
from deltakd.io.run_directory import RunDirectory
from deltakd.tracking.environment import environment, peak_memory_mib
from deltakd.training.assembly import make_model, make_tokenizer, shared_vocabulary
from deltakd.training.settings import RESUME_POLICY, RunSettings
from deltakd.types import TEACHER

log = logging.getLogger(__name__)

USAGE = """Let the teacher answer the training prompts; SFT on its answers is sequence-level KD.

  python -m deltakd.generate experiment=kd_gpt2 run_dir=outputs/seqkd [key=value ...]

Overrides are those of deltakd.train; the loss and the trainer's settings play no part. Answers are chosen by
  evaluation.decoding.do_sample=false  'evaluation.seeds=[10]' (the first counts)  evaluation.batch_size=32
Started again with the same run_dir it goes on where it stopped.
"""

#: Overrides that belong to the answering, or that SFT has no use for.
_OURS = (
    "run_dir",
    "resume",
    "loss",
    "delta_weight",
    "reference",
    "model.teacher",
    "evaluation.decoding",
    "evaluation.seeds",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and generate."""
    parser = argparse.ArgumentParser(
        "deltakd.generate", description=USAGE, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for deltakd.train")
    overrides = parser.parse_args(argv).overrides
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    # From the command line alone: an experiment's own run_dir is where its training goes.
    if not any(override.startswith("run_dir=") for override in overrides):
        overrides.append(f"run_dir=outputs/generate/{datetime.now():%Y-%m-%d_%H-%M-%S}")
    how_to_resume = f"the same command with {next(o for o in reversed(overrides) if o.startswith('run_dir='))}"
    guarded(lambda: run_generation(overrides), how_to_resume)


def run_generation(overrides: Sequence[str]) -> dict[str, Any]:
    """Answer, and log the command that trains on the answers; see ``run_answers``.

    Args:
        overrides: Hydra overrides, ``run_dir`` among them.
    """
    settings = make_answering_settings(compose_config("train", overrides))
    run_dir = Path(str(settings.run_dir))
    summary = run_answers(settings, run_dir)
    log.info("Next, SFT on the answers: %s", shlex.join(next_command(overrides, run_dir, bool(summary["held_out"]))))
    return summary


def run_answers(settings: RunSettings, run_dir: Path) -> dict[str, Any]:
    """Let the teacher answer every prompt that a training run with these settings would train on.

    The prompts are those of ``data`` (its exclusions, subset and limit applied, held-out validation rows left out),
    tokenised as in training. They are decoded by ``evaluation.decoding`` under the first of ``evaluation.seeds``. Of
    a conversation the prompt of the last answer is answered; earlier answers stay.

    Into ``run_dir`` go ``answers/`` (every answer; what is there already is not made again), ``train.jsonl`` (the
    rows with their new answers, those left out that are empty or did not end by EOS), ``val.jsonl`` (the rows held out
    by ``data.val_size``, as they were) and, last, ``summary.json``. A finished directory is only read.

    Args:
        settings: of the answering.
        run_dir: the directory.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigError: the directory holds something else.
        ValueError: data or models that can't be used, or no answer is left.
    """
    directory = RunDirectory(run_dir)
    teacher = str(settings.specs[TEACHER].path)
    answering = {"answering_teacher": version_of(teacher)} | dict(settings.record)
    directory.claim(answering, resume=directory.config.is_file(), policy=RESUME_POLICY)
    if directory.finished:
        log.info("%s is finished already; nothing to do.", run_dir)
        return directory.read_summary()
    started = time.perf_counter()
    parts = _load(settings, teacher, directory)
    counts, speed = answer_prompts(parts, directory.path, holds_out=settings.data.val is None)
    # Of this start alone: what a former one cost is not known.
    costs = {
        "seconds": round(time.perf_counter() - started, 3),
        "tokens_per_second": speed,
        "peak_memory_mib": round(peak_memory_mib(), 1),
    }
    summary = counts | {"meta": environment() | answering_record(parts) | costs}
    directory.write_summary(summary)
    return summary


def _load(settings: RunSettings, path: str, directory: RunDirectory) -> Answering:
    data = settings.data
    assert isinstance(data, InstructionData)
    if data.prepare is not None:
        data.prepare()
    tokenizer = make_tokenizer(settings, directory.path / "tokenizer")
    vocabulary = shared_vocabulary(settings, tokenizer)
    rows = data.read(tokenizer)
    teacher = make_model(settings, TEACHER, tokenizer, vocabulary).to("cuda" if torch.cuda.is_available() else "cpu")
    shown = settings.trainer.enable_progress_bar
    return Answering(path, data, settings.evaluation, rows, tokenizer, vocabulary, teacher, shown)


def next_command(overrides: Sequence[str], run_dir: Path, held_out: bool) -> list[str]:
    """The command that trains the student on the answers, with the same validation rows.

    Args:
        overrides: of the answering.
        run_dir: where the answers are.
        held_out: whether there is a ``val.jsonl``.
    """
    # What was chosen from the data is chosen: nothing is to be excluded or picked by line number a second time.
    sft = {"loss": "sft", "data.train": run_dir / TRAIN_FILE, "data.train_subset": "null", "data.exclude": "[]"}
    if held_out:
        sft["data.val"] = run_dir / VAL_FILE
    kept = [o for o in overrides if o.split("=", 1)[0] not in sft and not o.startswith(_OURS)]
    name = [] if any(o.startswith("name=") for o in kept) else ["name=seqkd"]
    return ["python", "-m", "deltakd.train", *kept, *name, *(f"{key}={value}" for key, value in sft.items())]


if __name__ == "__main__":
    main()
