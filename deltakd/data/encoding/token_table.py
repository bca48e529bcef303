"""Tables of tokens: a data set's rows, tokenised once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltakd.data.encoding.encode import Outcome, check_limits, outcome_of
from deltakd.data.encoding.encoded_set import EncodedSet
from deltakd.data.encoding.templates import Template
from deltakd.data.encoding.token_cache import (
    cached_table,
    fingerprint,
    flat_column,
    plain_column,
    quiet,
    tokenizer_fingerprint,
)
from deltakd.data.sources.records import Problems
from deltakd.data.sources.rows import Row, RowError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


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

    def encode(index: int) -> Outcome:
        with problems.noting(RowError):
            return outcome_of(examples[index], template, tokenizer, max_length, max_prompt_length, overlong)
        return Outcome(None, 0, 0, False, False)

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


def _tokenise(count: int, encode: Callable[[int], Outcome], key: str) -> Dataset:
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
