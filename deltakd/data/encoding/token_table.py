"""Tables of tokens: a data set's rows, tokenised once, kept on disk, and mapped into memory by every process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltakd.data.encoding.encode import Outcome, check_limits, encode_batch
from deltakd.data.encoding.encoded_set import EncodedSet
from deltakd.data.encoding.examples import examples
from deltakd.data.encoding.segments import Template
from deltakd.data.encoding.token_cache import fingerprint, tokenizer_fingerprint
from deltakd.data.sources.records import Problems
from deltakd.data.sources.rows import Row
from deltakd.data.sources.stored_rows import rows_digest
from deltakd.io.arrays import Arrays, ArrayWriter, kept_arrays
from deltakd.io.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Fewer rows than this take seconds to tokenise and need no progress bar.
LONG_TABLE = 20_000
#: Rows tokenised at once.
BATCH = 1_000
_DTYPES = {"input_ids": "<i4", "labels": "<i4", "lengths": "<i8", "row_ids": "<i8"}
#: What happens to rows, counted.
_COUNTS = ("cut_prompts", "cut_responses", "dropped", "kept_borders", "control_tokens")


def encode_rows(
    rows: Sequence[Row],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    overlong: str = "cut",
    split_turns: bool = False,
    cache_dir: str | Path | None = None,
) -> EncodedSet:
    """Tokenise rows once; each response becomes its own example, under the row's id.

    Args:
        rows: the rows.
        template, tokenizer, max_length, max_prompt_length, overlong: as for ``encode_row``.
        split_turns: make an example of each answer of a conversation (``examples``).
        cache_dir: folder that keeps the tokens for later runs; None: they are only in a temporary place.

    Raises:
        ValueError: as ``encode_row`` (all rows that the template can't render are named together), or no row is left.
    """
    check_limits(tokenizer, max_length, max_prompt_length, overlong)
    if not len(rows):
        raise ValueError("there are no rows to tokenise")
    limits = [max_length, max_prompt_length, overlong]
    key = fingerprint("rows", rows_digest(rows), tokenizer_fingerprint(tokenizer), repr(template), limits, split_turns)
    problems = Problems("data")

    def encode(batch: Sequence[Row]) -> list[Outcome]:
        outcomes = encode_batch(batch, template, tokenizer, max_length, max_prompt_length, overlong)
        for outcome in outcomes:
            if outcome.problem is not None:
                problems.add(str(outcome.problem))
        return outcomes

    def build(writer: ArrayWriter) -> None:
        _tokenise(rows, split_turns, encode, writer)
        problems.raise_any()

    table = kept_arrays(f"tokens-{key}", cache_dir, _DTYPES, build, "tokens")
    return _as_set(table, key, max_length, max_prompt_length)


def _examples(rows: Sequence[Row], split_turns: bool) -> Iterator[tuple[int, Row]]:
    """Yield the place of a row, and each of its examples."""
    for place, row in enumerate(rows):
        for example in examples(row, split_turns):
            yield place, example


def _tokenise(
    rows: Sequence[Row], split_turns: bool, encode: Callable[[Sequence[Row]], list[Outcome]], writer: ArrayWriter
) -> None:
    counts, spans = dict.fromkeys(("rows", *_COUNTS), 0), _Spans()
    with progress_bar("tokenising", len(rows), len(rows) >= LONG_TABLE) as advance:
        for batch in _batches(_examples(rows, split_turns)):
            outcomes = encode([row for _, row in batch])
            spans.add(outcomes)
            kept = [outcome.encoded for outcome in outcomes if outcome.encoded is not None]
            for name in ("input_ids", "labels"):
                writer.append(name, np.fromiter(chain.from_iterable(getattr(one, name) for one in kept), np.int32))
            writer.append("lengths", [len(one.input_ids) for one in kept])
            writer.append("row_ids", [one.row_id for one in kept])
            counts["rows"] += len(outcomes)
            counts["dropped"] += len(outcomes) - len(kept)
            counts["cut_prompts"] += sum(outcome.cut_prompt for outcome in outcomes)
            counts["cut_responses"] += sum(outcome.cut_response for outcome in outcomes)
            counts["kept_borders"] += sum(outcome.kept_border for outcome in outcomes)
            counts["control_tokens"] += sum(outcome.control_tokens for outcome in outcomes)
            advance(batch[-1][0] + 1)
    writer.meta |= {"counts": counts, "spans": spans.found}


class _Spans:
    """The least and the most tokens of prompts, and of whole rows, before anything is cut."""

    def __init__(self) -> None:
        self.found: dict[str, list[int]] = {}

    def add(self, outcomes: Sequence[Outcome]) -> None:
        lengths = {"prompts": [o.prompt_length for o in outcomes], "totals": [o.total_length for o in outcomes]}
        for name, these in lengths.items():
            every = [*these, *self.found.get(name, ())]
            self.found[name] = [min(every), max(every)]


def _batches(examples: Iterator[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    while batch := list(islice(examples, BATCH)):
        yield batch


def _as_set(table: Arrays, key: str, max_length: int, max_prompt_length: int) -> EncodedSet:
    arrays, counts = table.arrays, table.meta["counts"]
    if not len(arrays["row_ids"]):
        raise ValueError(_nothing_left(table.meta, max_length, max_prompt_length))
    offsets = np.concatenate([[0], np.cumsum(arrays["lengths"])])
    return EncodedSet(arrays["input_ids"], arrays["labels"], offsets, arrays["row_ids"], dict(counts), key)


def _nothing_left(meta: dict[str, Any], max_length: int, max_prompt_length: int) -> str:
    prompts, totals = meta["spans"]["prompts"], meta["spans"]["totals"]
    return (
        f"all {meta['counts']['rows']} rows are longer than the limits, so nothing is left to train on: prompts have "
        f"{prompts[0]} to {prompts[1]} tokens (data.max_prompt_length = {max_prompt_length}), with response "
        f"{totals[0]} to {totals[1]} (data.max_length = {max_length}); raise these keys or set data.overlong=cut"
    )
