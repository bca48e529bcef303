"""A teacher's answers to the training prompts as training data: sequence-level KD (Kim & Rush, arXiv 1606.07947)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltakd.data import InstructionData, Row, SplitRows, row_record, tokenizer_fingerprint, with_answer
from deltakd.evaluation import EvaluationSet, answer_set, matches
from deltakd.evaluation.answers import make_set
from deltakd.evaluation.settings import EvaluationSettings
from deltakd.io.errors import ConfigError
from deltakd.io.files import read_json_lines, write_json_lines
from deltakd.io.progress import progress_bar
from deltakd.models import LanguageModel, ModelSpec
from deltakd.models.identity import count_parameters, model_identity
from deltakd.models.tokenizers import pad_id
from deltakd.models.vocabulary import unknown_prompt_problems
from deltakd.types import TEACHER

log = logging.getLogger(__name__)

#: Prompts per file of ``answers/``: the maximum loss through an interruption, and the largest batch.
SHARD_PROMPTS = 256

TRAIN_FILE = "train.jsonl"
VAL_FILE = "val.jsonl"


@dataclass(frozen=True)
class Answering:
    """Everything needed for answering, loaded.

    Args:
        path: path of the teacher, for the log and the record.
        data: gives the template and the prompt length, as the teacher reads prompts.
        evaluation: how answers are decoded.
        rows: the training rows, whose prompts are answered, and the validation rows.
        tokenizer: the teacher's.
        vocabulary: number of tokens that it may write: those that the student has, too, if they share a tokenizer.
        teacher: on its device.
        show_progress: show a progress bar.
    """

    path: str
    data: InstructionData
    evaluation: EvaluationSettings
    rows: SplitRows
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    teacher: LanguageModel
    show_progress: bool = True


def answer_prompts(parts: Answering, directory: Path, holds_out: bool) -> tuple[dict[str, Any], float | None]:
    """Answer every training prompt, and write the rows with the new answers.

    Args:
        parts: everything loaded.
        directory: gets ``answers/`` (existing answers are reused), ``train.jsonl`` and ``val.jsonl``.
        holds_out: True if the validation rows were held out of the training rows; they are written unchanged.

    Returns:
        The counts, and the speed (tokens/s; None if nothing was left to do).

    Raises:
        ValueError: no answer is left.
    """
    records, speed = _answer_all(parts, directory / "answers")
    kept, counts = _keep(parts.rows.train, records)
    held_out = parts.rows.val if holds_out else []
    if held_out:
        write_json_lines(directory / VAL_FILE, [row_record(row) for row in held_out], "answers")
    write_json_lines(directory / TRAIN_FILE, kept, "answers")
    _report(counts, directory, parts.evaluation.decoding.max_new_tokens)
    return counts | {"held_out": len(held_out)}, speed


def _answer_all(parts: Answering, folder: Path) -> tuple[list[dict[str, Any]], float | None]:
    """Return the records of all rows, in order, and the speed (tokens/s; None if nothing was left to do)."""
    rows, evaluation = parts.rows.train, parts.evaluation
    log.info("%s answers %d prompts.", parts.path, len(rows))
    records: list[dict[str, Any]] = []
    tokens, seconds = 0, 0.0
    with progress_bar("answers", len(rows), parts.show_progress) as advance:
        for start in range(0, len(rows), SHARD_PROMPTS):
            shard = make_set("train", rows[start : start + SHARD_PROMPTS], parts.data, parts.tokenizer)
            problems = unknown_prompt_problems(
                "data.train", shard.prompt_ids, shard.row_ids, parts.tokenizer, parts.vocabulary
            )
            if problems:
                raise ConfigError(problems)
            path = folder / f"part_{start // SHARD_PROMPTS:05d}.jsonl"
            answers = read_json_lines(path)
            if answers is None or not matches(answers, shard, evaluation.decoding, evaluation.seeds[0]):
                began = time.perf_counter()
                answers = _answer(parts, shard, partial(_advance, advance, start))
                write_json_lines(path, answers, "answers")
                seconds += time.perf_counter() - began
                tokens += sum(record["output_tokens"] for record in answers)
            records += answers
            log.info("%d of %d prompts answered.", len(records), len(rows))
    return records, round(tokens / seconds, 1) if seconds else None


def _answer(parts: Answering, shard: EvaluationSet, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    evaluation = parts.evaluation
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
        static_cache=evaluation.static_cache,
        progress=progress,
    )
    return by_seed[seed]


def _advance(advance: Callable[[int], None], start: int, done: int) -> None:
    advance(start + done)


def _keep(rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the records of ``train.jsonl`` and the counts of the summary.

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


def _report(summary: dict[str, Any], directory: Path, max_new_tokens: int) -> None:
    log.info(
        "%s: %d of %d prompts with their answers, of %.1f tokens on average.",
        directory / TRAIN_FILE,
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


def answering_record(parts: Answering) -> dict[str, Any]:
    """Return who answered, and how, for ``summary.json``."""
    path, evaluation = parts.path, parts.evaluation
    return {
        "teacher": path,
        "teacher_sha256": model_identity(ModelSpec(path=path))["sha256"],
        "parameters": count_parameters({TEACHER: parts.teacher}),
        "tokenizer": parts.tokenizer.name_or_path,
        "tokenizer_sha256": tokenizer_fingerprint(parts.tokenizer),
        "decoding": asdict(evaluation.decoding),
        "seed": evaluation.seeds[0],
        "excluded": parts.rows.excluded,
    }
