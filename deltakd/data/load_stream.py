"""From a data config to a stream: list the shards, read the first rows, and set up how the rest is read."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from deltakd.data.encoding.block_examples import BlockExamples
from deltakd.data.encoding.encoded_set import EncodedSet
from deltakd.data.encoding.example_stream import RowExamples, Stream
from deltakd.data.encoding.packing import pack_texts
from deltakd.data.encoding.segments import Template
from deltakd.data.encoding.token_cache import fingerprint, tokenizer_fingerprint
from deltakd.data.encoding.token_table import encode_rows
from deltakd.data.encoding.two_tokenizers import Coding
from deltakd.data.load import LoadedSets, banned_rows
from deltakd.data.routing import with_tasks
from deltakd.data.sources.overlap import overlapping
from deltakd.data.sources.passes import Passes, Read
from deltakd.data.sources.readers import _stripped
from deltakd.data.sources.rows import Row
from deltakd.data.sources.shards import Shard, absent_columns, list_shards, read_shard_rows, read_shard_texts
from deltakd.data.sources.tasks import Tasks, task_digests, unlike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

T = TypeVar("T")
#: Rows or documents read before models load, so that errors common to all rows show at once.
FIRST_ROWS, FIRST_DOCUMENTS = 64, 16


def open_instruction_stream(
    train: str | Sequence[str],
    *,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    overlong: str,
    split_turns: bool,
    shuffle_buffer: int,
    exclude: Sequence[str] = (),
    val_rows: Sequence[Row] = (),
    strip_answers: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    teachers: Coding | None = None,
) -> tuple[Stream, EncodedSet]:
    """Open a stream of instruction rows.

    Tasks of ``exclude`` and ``val_rows``, and near duplicates of the former, are left out by the rules of
    ``split_rows``, buffer by buffer: the rows of a buffer determine which instructions are generic, and which text is
    a prompt's frame.

    Args:
        train, columns: as for ``list_shards``.
        template, tokenizer, max_length, max_prompt_length, overlong, split_turns, teachers: as for ``encode_rows``.
        shuffle_buffer: rows shuffled in memory.
        exclude, strip_answers: as for ``split_rows``.
        val_rows: rows to validate on.
        limit: keep only the first ``limit`` rows of every pass.

    Returns:
        The stream, and its first rows as ``encode_rows`` gives them.

    Raises:
        ValueError: a source can't be read, or one of the first rows can't be used.
    """
    shards = list_shards(train, columns)
    banned = banned_rows(exclude, columns)
    banned_tasks, val_tasks = task_digests(banned), task_digests(val_rows)
    encoding: dict[str, Any] = {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "overlong": overlong,
        "split_turns": split_turns,
    }

    def read(shard: Shard, start: int) -> Iterator[tuple[int, Row]]:
        for number, row in read_shard_rows(shard, start):
            yield number, _stripped(row, strip_answers, row.where) if strip_answers else row

    def keep(rows: list[Row]) -> list[Row]:
        rows = _unlike(rows, banned_tasks)
        repeated = overlapping(rows, banned) if banned else set()
        return _unlike([row for at, row in enumerate(rows) if at not in repeated], val_tasks)

    def start(seed: int) -> RowExamples:
        passes = Passes(
            shards, read, seed=seed, size=shuffle_buffer, limit=limit, keep=keep if banned or val_rows else None
        )
        own = None if teachers is None else replace(teachers, tokenizer=_own(teachers.tokenizer))
        return RowExamples(passes, template, _own(tokenizer), teachers=own, **encoding)

    rules: list[Any] = ["rows", repr(template), encoding, strip_answers, [row.question for row in (*banned, *val_rows)]]
    rules += [] if teachers is None else [teachers.identity]
    key = _fingerprint(shards, tokenizer, shuffle_buffer, limit, rules)
    rows = _first(shards, read, FIRST_ROWS, columns)
    first = with_tasks(encode_rows(rows, template, tokenizer, teachers=teachers, **encoding), rows, None)
    return Stream(shards, start, key), replace(first, fingerprint=key)


def open_text_stream(
    train: str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    shuffle_buffer: int,
    max_tokens: int | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> tuple[Stream, EncodedSet]:
    """Open a stream of documents.

    Args:
        train, shuffle_buffer, columns, limit: as for ``open_instruction_stream``.
        tokenizer, block_length: as for ``pack_texts``.
        max_tokens: total tokens to train on.

    Returns:
        The stream, and blocks of its first documents.

    Raises:
        ValueError: as ``open_instruction_stream``.
    """
    shards = list_shards(train, columns)

    def start(seed: int) -> BlockExamples:
        passes = Passes(shards, read_shard_texts, seed=seed, size=shuffle_buffer, limit=limit)
        return BlockExamples(passes, _own(tokenizer), block_length, max_tokens)

    key = _fingerprint(shards, tokenizer, shuffle_buffer, limit, ["text", block_length])
    first = pack_texts(_first(shards, read_shard_texts, FIRST_DOCUMENTS, columns), tokenizer, block_length)
    return Stream(shards, start, key), replace(first, fingerprint=key)


def streamed_sets(
    stream: Stream, first: EncodedSet, val: EncodedSet | None, val_rows: Sequence[Row] = ()
) -> LoadedSets:
    """Return a stream and its validation data as a run's sets, and log what is streamed.

    Args:
        stream, first: from ``open_instruction_stream`` or ``open_text_stream``.
        val: the validation set, or None.
        val_rows: its rows, if any.
    """
    sizes = [shard.size for shard in stream.shards]
    together = sum(size or 0 for size in sizes) / 2**20
    log.info(
        "stream: %d shard%s%s; %d examples to validate on",
        len(sizes),
        "" if len(sizes) == 1 else "s",
        "" if None in sizes else f", together {together:,.1f} MiB",
        0 if val is None else len(val),
    )
    counts = {"val_rows": len(val_rows) if val is None or val_rows else val.counts["rows"]}
    counts |= {} if val is None else {f"val/{name}": count for name, count in val.counts.items()}
    return LoadedSets(first, val, list(val_rows), [], counts, stream)


def _fingerprint(
    shards: Sequence[Shard], tokenizer: PreTrainedTokenizerBase, size: int, limit: int | None, rules: list[Any]
) -> str:
    versions = [(shard.name, shard.source.filter, dict(shard.source.columns), shard.version) for shard in shards]
    return fingerprint("stream", versions, tokenizer_fingerprint(tokenizer), size, limit, rules)


def _first(shards: Sequence[Shard], read: Read[T], count: int, columns: Mapping[str, str] | None) -> list[T]:
    """Return the first items of the shards in their order.

    Warns of columns that none of them has: a stream is not read to the end to learn whether a later one does.
    """
    absent = absent_columns(shards, count) if columns else []
    try:
        items = list(islice((item for shard in shards for _, item in read(shard, 0)), count))
    except ValueError as error:
        # Most often the name of the column is wrong, and not the row.
        if absent:
            raise ValueError("; ".join(absent)) from error
        raise
    if not items:
        others = " and the other shards are" if len(shards) > 1 else " is"
        raise ValueError(f"{shards[0].name}{others} empty; give data with at least one row")
    for sentence in absent:
        log.warning("%s.", sentence)
    return items


def _unlike(rows: list[Row], tasks: Tasks) -> list[Row]:
    kept = unlike(task_digests(rows), tasks)
    return [row for row, keep in zip(rows, kept, strict=True) if keep]


def _own(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Copy the tokenizer for a thread: Rust's tokenizers refuse to pad in one thread while another one encodes."""
    return copy.deepcopy(tokenizer)
