"""A teacher's answers to the training prompts, as training data: sequence-level KD (Kim & Rush, arXiv 1606.07947)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from deltakd.config.check import Plan, make_plan
from deltakd.data import InstructionData, Row, SplitRows, row_record, tokenizer_fingerprint, with_answer
from deltakd.evaluation import EvaluationSet, answer_set, matches
from deltakd.evaluation.answers import make_set, pad_id, progress_bar
from deltakd.io.files import read_json_lines, write_json_lines
from deltakd.io.run_directory import RunDirectory
from deltakd.models import LanguageModel
from deltakd.tracking.environment import count_parameters, environment, hub_snapshot, model_fingerprint, peak_memory_mib
from deltakd.training.assembly import make_model, make_tokenizer, shared_vocabulary
from deltakd.types import TEACHER

log = logging.getLogger(__name__)

#: Prompts of one file of ``answers/``: what an interruption costs at most; a larger batch than this is never made.
SHARD_PROMPTS = 256

TRAIN_FILE = "train.jsonl"
VAL_FILE = "val.jsonl"


@dataclass(frozen=True)
class Answering:
    """What answering needs once everything is loaded.

    Args:
        plan: the checked config.
        rows: whose prompts are answered, and the validation rows.
        tokenizer: the student's, which the teacher has been proved to share.
        vocabulary: number of tokens that both share.
        teacher: on the device where it answers.
    """

    plan: Plan
    rows: SplitRows
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    teacher: LanguageModel


def run_answers(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Let the teacher answer every prompt that a training with this config would train on.

    The prompts are those of ``data`` (its exclusions, subset and limit applied, held-out validation rows left out),
    tokenised as in training. They are decoded by ``evaluation.decoding`` under the first of ``evaluation.seeds``. Of
    a conversation the prompt of the last answer is answered; earlier answers stay.

    Into ``run_dir`` go ``answers/`` (every answer; what is there already is not made again), ``train.jsonl`` (the
    rows with their new answers, those left out that are empty or did not end by EOS), ``val.jsonl`` (the rows held out
    by ``data.val_size``, as they were) and, last, ``summary.json``. A finished directory is only read.

    Args:
        cfg: composed config (``conf/train.yaml``).
        run_dir: the directory.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigError: everything that is wrong with the config, before any weight is loaded.
        ValueError: data or models that can't be used, or no answer is left.
    """
    plan = make_plan(cfg, roles={TEACHER}, needs_prompts=True)
    directory = RunDirectory(run_dir)
    directory.claim({"answering_teacher": _version(plan)} | plan.config, resume=directory.config.is_file())
    if directory.finished:
        log.info("%s is finished already; nothing to do.", run_dir)
        return directory.read_summary()
    started = time.perf_counter()
    parts = _load(plan, directory)
    records, speed = _answer_all(parts, directory.path / "answers")
    kept, summary = _keep(parts.rows.train, records)
    held_out = parts.rows.val if plan.config["data"]["val"] is None else []
    if held_out:
        write_json_lines(directory.path / VAL_FILE, [row_record(row) for row in held_out], "answers")
    write_json_lines(directory.path / TRAIN_FILE, kept, "answers")
    _report(summary, directory, plan.evaluation.decoding.max_new_tokens)
    # Of this start alone: what a former one cost is not known.
    costs = {
        "seconds": round(time.perf_counter() - started, 3),
        "tokens_per_second": speed,
        "peak_memory_mib": round(peak_memory_mib(), 1),
    }
    summary |= {"held_out": len(held_out), "meta": _meta(parts) | costs}
    directory.write_summary(summary)
    return summary


def _version(plan: Plan) -> str | None:
    """Of the teacher: a local directory's fingerprint, or the commit of the hub's model."""
    path = str(plan.specs[TEACHER].path)
    snapshot = None if Path(path).is_dir() else hub_snapshot(path)
    return model_fingerprint(path) if snapshot is None else snapshot.name


def _load(plan: Plan, directory: RunDirectory) -> Answering:
    assert isinstance(plan.data, InstructionData)
    if plan.data.prepare is not None:
        plan.data.prepare()
    tokenizer = make_tokenizer(plan, directory.path / "tokenizer")
    vocabulary = shared_vocabulary(plan, tokenizer)
    rows = plan.data.read(tokenizer)
    teacher = make_model(plan, TEACHER, tokenizer, vocabulary).to("cuda" if torch.cuda.is_available() else "cpu")
    return Answering(plan, rows, tokenizer, vocabulary, teacher)


def _answer_all(parts: Answering, folder: Path) -> tuple[list[dict[str, Any]], float | None]:
    """The records of all rows, in order, and the speed (tokens/s, None where nothing was left to do)."""
    rows, plan = parts.rows.train, parts.plan
    log.info("%s answers %d prompts.", plan.specs[TEACHER].path, len(rows))
    records: list[dict[str, Any]] = []
    tokens, seconds = 0, 0.0
    with progress_bar("answers", len(rows), plan.config["trainer"]["enable_progress_bar"]) as advance:
        for start in range(0, len(rows), SHARD_PROMPTS):
            shard = make_set("train", rows[start : start + SHARD_PROMPTS], plan.data, parts.tokenizer)
            path = folder / f"part_{start // SHARD_PROMPTS:05d}.jsonl"
            answers = read_json_lines(path)
            if answers is None or not matches(answers, shard, plan.evaluation.decoding, plan.evaluation.seeds[0]):
                began = time.perf_counter()
                answers = _answer(parts, shard, partial(_advance, advance, start))
                write_json_lines(path, answers, "answers")
                seconds += time.perf_counter() - began
                tokens += sum(record["output_tokens"] for record in answers)
            records += answers
            log.info("%d of %d prompts answered.", len(records), len(rows))
    return records, round(tokens / seconds, 1) if seconds else None


def _answer(parts: Answering, shard: EvaluationSet, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    evaluation = parts.plan.evaluation
    seed = evaluation.seeds[0]
    by_seed = answer_set(
        parts.teacher.hf,
        parts.tokenizer,
        shard,
        decoding=evaluation.decoding,
        seeds=[seed],
        batch_size=evaluation.batch_size,
        vocab_size=parts.vocabulary,
        pad_id=pad_id(parts.tokenizer, parts.vocabulary),
        progress=progress,
    )
    return by_seed[seed]


def _advance(advance: Callable[[int], None], start: int, done: int) -> None:
    advance(start + done)


def _keep(rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of ``train.jsonl``, and the counts of the summary.

    Raises:
        ValueError: nothing is left.
    """
    pairs = list(zip(rows, records, strict=True))
    finished = [(row, record) for row, record in pairs if record["finished"]]
    answered = [(row, record) for row, record in finished if record["output"].strip()]
    counts = {
        "prompts": len(pairs),
        "answered": len(answered),
        "empty": len(finished) - len(answered),
        "unfinished": len(pairs) - len(finished),
    }
    if not answered:
        raise ValueError(
            f"of the teacher's {len(pairs)} answers {counts['unfinished']} did not end and {counts['empty']} are "
            "empty, so there is nothing to train on; give more room (evaluation.decoding.max_new_tokens=...), or a "
            "teacher that has learnt to answer in data.template"
        )
    tokens = sum(record["output_tokens"] for _, record in answered) / len(answered)
    return [row_record(with_answer(row, record["output"])) for row, record in answered], counts | {
        "answer_tokens": round(tokens, 3)
    }


def _report(summary: dict[str, Any], directory: RunDirectory, max_new_tokens: int) -> None:
    log.info(
        "%s: %d of %d prompts with their answers, of %.1f tokens on average.",
        directory.path / TRAIN_FILE,
        summary["answered"],
        summary["prompts"],
        summary["answer_tokens"],
    )
    if summary["unfinished"] or summary["empty"]:
        log.warning(
            "%d answers did not end within evaluation.decoding.max_new_tokens=%d (or the model's positions), and %d "
            "are empty. They are left out of %s: an answer without its end would teach EOS in mid-sentence.",
            summary["unfinished"],
            max_new_tokens,
            summary["empty"],
            TRAIN_FILE,
        )


def _meta(parts: Answering) -> dict[str, Any]:
    """Who answered, how, and where."""
    path, evaluation = str(parts.plan.specs[TEACHER].path), parts.plan.evaluation
    files = path if Path(path).is_dir() else hub_snapshot(path)
    return environment() | {
        "teacher": path,
        "teacher_sha256": None if files is None else model_fingerprint(files),
        "parameters": count_parameters({TEACHER: parts.teacher}),
        "tokenizer": parts.tokenizer.name_or_path,
        "tokenizer_sha256": tokenizer_fingerprint(parts.tokenizer),
        "decoding": asdict(evaluation.decoding),
        "seed": evaluation.seeds[0],
        "excluded": parts.rows.excluded,
    }
