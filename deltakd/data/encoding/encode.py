"""Rows to tokens: prompt and response are tokenised separately; only the response and its EOS are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltakd.data.encoding.encoded_set import Encoded, EncodedSet
from deltakd.data.encoding.templates import Template
from deltakd.data.encoding.token_cache import (
    cached_table,
    fingerprint,
    flat_column,
    plain_column,
    quiet,
    tokenizer_fingerprint,
)
from deltakd.data.encoding.tokens import eos_id, prompt_tokens, segment_tokens
from deltakd.data.encoding.trained_text import check_trained
from deltakd.data.sources.records import Problems
from deltakd.data.sources.rows import Row, RowError
from deltakd.types import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "EncodedSet", "encode_prompt", "encode_row", "encode_rows"]


@dataclass(frozen=True)
class _Outcome:
    """An encoded row: its tokens (None if dropped), its lengths before cutting, and what was cut."""

    encoded: Encoded | None
    prompt_length: int
    total_length: int
    cut_prompt: bool
    cut_response: bool


def encode_row(
    row: Row,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    overlong: str = "cut",
) -> Encoded | None:
    """Tokenise one row for training on its first response.

    Args:
        row: the row.
        template: renders it.
        tokenizer: must have an EOS token.
        max_length: most tokens of prompt and response, EOS included.
        max_prompt_length: most tokens of the prompt; in a conversation, of everything before its first answer.
        overlong: ``cut`` shortens a long prompt (``prompt_tokens``), and a long response, which then has no EOS to
            learn; ``drop`` leaves the row out.

    Returns:
        The tokens, or None if the row is dropped or has nothing to train on.

    Raises:
        RowError: the template can't render the row, or leaves out a part of its answers.
        ValueError: there is no EOS token or no response, or the limits contradict each other or leave no room for the
            tail.
    """
    check_limits(tokenizer, max_length, max_prompt_length, overlong)
    return _encode(row, template, tokenizer, max_length, max_prompt_length, overlong).encoded


def encode_prompt(
    row: Row, template: Template, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> list[int]:
    """Return the prompt's tokens for generation: the same as in training, cut to ``max_prompt_length``.

    In a conversation, the prompt is everything before the last answer; training limits only its first prompt.

    Raises:
        ValueError: the limit leaves no room for the template's tail.
    """
    return _cut_prompt(row, template, tokenizer, max_prompt_length)[0]


def encode_prompts(
    rows: Sequence[Row], template: Template, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> tuple[list[list[int]], int]:
    """Return the tokens of many prompts, each as from ``encode_prompt``, and the number of prompts cut.

    Raises:
        ValueError: as ``encode_prompt``; all rows that the template refuses are named together.
    """
    problems = Problems("prompts")
    cut = []
    for row in rows:
        with problems.noting(RowError):
            cut.append(_cut_prompt(row, template, tokenizer, max_prompt_length))
    problems.raise_any()
    return [ids for ids, _ in cut], sum(whole > len(ids) for ids, whole in cut)


def _cut_prompt(
    row: Row, template: Template, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> tuple[list[int], int]:
    segments = template.render(row)
    answers = [number for number, segment in enumerate(segments) if segment.trained]
    prompt = segments[: answers[-1]] if answers else segments
    return prompt_tokens(prompt, row, template, tokenizer, max_prompt_length)


def check_limits(tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int, overlong: str) -> None:
    """Raise a ValueError if the settings cannot work."""
    if overlong not in ("cut", "drop"):
        raise ValueError(f"data.overlong = {overlong!r}; allowed: cut, drop")
    if not 0 < max_prompt_length < max_length:
        raise ValueError(
            f"data.max_prompt_length = {max_prompt_length} must be at least 1 and less than data.max_length = "
            f"{max_length}, so that every row has room for a response"
        )
    eos_id(tokenizer)


def _encode(
    row: Row,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    overlong: str,
) -> _Outcome:
    segments = template.render(row)
    answer = next((number for number, segment in enumerate(segments) if segment.trained), None)
    if answer is None:
        raise ValueError(f"{row.label} has no response to train on")
    check_trained(row, segments)
    ids, prompt_length = prompt_tokens(segments[:answer], row, template, tokenizer, max_prompt_length)
    labels = [IGNORE_INDEX] * len(ids)
    for segment in segments[answer:]:
        tokens = segment_tokens(segment, tokenizer)
        ids += tokens
        labels += tokens if segment.trained else [IGNORE_INDEX] * len(tokens)
    total_length = len(ids) + prompt_length - min(prompt_length, max_prompt_length)
    cut_prompt, cut_response = prompt_length > max_prompt_length, len(ids) > max_length
    if overlong == "drop" and (cut_prompt or total_length > max_length):
        return _Outcome(None, prompt_length, total_length, False, False)
    ids, labels = _trim(ids[:max_length], labels[:max_length])
    # Nothing predicts position 0, so a label there trains nothing.
    encoded = Encoded(ids, labels, row.id) if any(label != IGNORE_INDEX for label in labels[1:]) else None
    return _Outcome(encoded, prompt_length, total_length, cut_prompt, cut_response)


def _trim(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Drop everything after the last trained token: it would cost time and teach nothing."""
    stop = len(labels)
    while stop and labels[stop - 1] == IGNORE_INDEX:
        stop -= 1
    return ids[:stop], labels[:stop]


def encode_rows(
    rows: Sequence[Row],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    overlong: str = "cut",
    cache_dir: str | Path | None = None,
) -> EncodedSet:
    """Tokenise rows once; each response becomes its own example, under the row's id.

    Args:
        rows: the rows.
        template, tokenizer, max_length, max_prompt_length, overlong: as for ``encode_row``.
        cache_dir: folder that keeps the tokens for later runs; None keeps nothing.

    Raises:
        ValueError: as ``encode_row`` (all rows that the template can't render are named together), or no row is left.
    """
    check_limits(tokenizer, max_length, max_prompt_length, overlong)
    examples = _expand(rows)
    limits: list[Any] = [max_length, max_prompt_length, overlong]
    if any(template.keeps_end(row) for row in examples):
        # Tables without this mark were cut at the end of the prompt, and had lost the last question.
        limits.append("end")
    contents = [{key: value for key, value in asdict(row).items() if key != "where"} for row in examples]
    key = fingerprint("rows", contents, tokenizer_fingerprint(tokenizer), repr(template), limits)
    problems = Problems("data")

    def encode(index: int) -> _Outcome:
        with problems.noting(RowError):
            return _encode(examples[index], template, tokenizer, max_length, max_prompt_length, overlong)
        return _Outcome(None, 0, 0, False, False)

    def build() -> Dataset:
        table = _tokenise(len(examples), encode, key)
        problems.raise_any()
        return table

    return _as_set(cached_table(key, cache_dir, build), key, max_length, max_prompt_length)


def _expand(rows: Sequence[Row]) -> list[Row]:
    return [
        row if len(row.responses) < 2 else replace(row, responses=(response,))
        for row in rows
        for response in (row.responses or ("",))
    ]


def _tokenise(count: int, encode: Callable[[int], _Outcome], key: str) -> Dataset:
    from datasets import Dataset, Features, List, Value

    def batch(columns: dict[str, list[int]]) -> dict[str, list[Any]]:
        outcomes = [encode(index) for index in columns["index"]]
        return {
            "input_ids": [o.encoded.input_ids if o.encoded else [] for o in outcomes],
            "labels": [o.encoded.labels if o.encoded else [] for o in outcomes],
            "row_id": [o.encoded.row_id if o.encoded else -1 for o in outcomes],
            "prompt_length": [o.prompt_length for o in outcomes],
            "total_length": [o.total_length for o in outcomes],
            "cut_prompt": [int(o.cut_prompt) for o in outcomes],
            "cut_response": [int(o.cut_response) for o in outcomes],
        }

    numbers = ("row_id", "prompt_length", "total_length", "cut_prompt", "cut_response")
    features = Features(
        {"input_ids": List(Value("int32")), "labels": List(Value("int32"))} | {name: Value("int64") for name in numbers}
    )
    with quiet(count):
        # Our own fingerprint: by default `datasets` would pickle tokenizer and rows to hash them.
        return Dataset.from_dict({"index": list(range(count))}).map(
            batch,
            batched=True,
            remove_columns=["index"],
            features=features,
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=key,
            desc="tokenising",
        )


def _as_set(table: Dataset, key: str, max_length: int, max_prompt_length: int) -> EncodedSet:
    input_ids, offsets = flat_column(table, "input_ids")
    labels, _ = flat_column(table, "labels")
    kept = np.diff(offsets) > 0
    if not kept.any():
        raise ValueError(_nothing_left(table, max_length, max_prompt_length))
    counts = {
        "rows": len(kept),
        "cut_prompts": int(plain_column(table, "cut_prompt").sum()),
        "cut_responses": int(plain_column(table, "cut_response").sum()),
        "dropped": int((~kept).sum()),
    }
    # Dropped rows are empty, so dropping their offsets drops them altogether.
    starts = np.concatenate([offsets[:-1][kept], offsets[-1:]])
    return EncodedSet(input_ids, labels, starts, plain_column(table, "row_id")[kept], counts, key)


def _nothing_left(table: Dataset, max_length: int, max_prompt_length: int) -> str:
    prompts, totals = plain_column(table, "prompt_length"), plain_column(table, "total_length")
    return (
        f"all {len(table)} rows are longer than the limits, so nothing is left to train on: prompts have "
        f"{prompts.min()} to {prompts.max()} tokens (data.max_prompt_length = {max_prompt_length}), with response "
        f"{totals.min()} to {totals.max()} (data.max_length = {max_length}); raise these keys or set data.overlong=cut"
    )
