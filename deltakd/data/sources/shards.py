"""Data in shards, for streaming: folders, globs, files, and hub data sets in their streamed form.

A shard is one file, or one shard of a hub data set. Listing shards reads nothing, and reading a shard can start at any
record, so a stream of terabytes starts and resumes in seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import dropwhile, groupby, islice
from pathlib import Path
from typing import Any

from deltakd.data.sources.file_formats import Problems, Record, read_file, without_gaps
from deltakd.data.sources.parsing import parse_row, unread_keys
from deltakd.data.sources.readers import documents, text_of, warn_once
from deltakd.data.sources.records import (
    Source,
    is_hub_id,
    is_text,
    no_column,
    parse_source,
    source_files,
    unreachable,
    with_our_names,
)
from deltakd.data.sources.rows import Row
from deltakd.io.hub import hub_reachable

log = logging.getLogger(__name__)

#: A row's id is shard · 2^ROW_BITS + record, which fits int64 for 8 million shards of a trillion records.
ROW_BITS = 40


@dataclass(frozen=True)
class Shard:
    """A part of the data that is read sequentially.

    Args:
        number: its position in the list of shards.
        name: for messages: the file, or the hub data set and the number of its shard.
        source: where it is, and the filter on its records.
        version: identifies its content: a file's size in bytes, or the version of a hub data set.
        part: number of the shard within a hub data set; None: a file.
    """

    number: int
    name: str
    source: Source
    version: str
    part: int | None = None

    @property
    def size(self) -> int | None:
        """Size of the file in bytes; None for a shard of a hub data set."""
        return int(self.version.split()[0]) if self.part is None else None

    def check(self) -> None:
        """Raise a ValueError if the file is gone or its size has changed since it was listed."""
        if self.part is not None:
            return
        try:
            version = _version(Path(self.source.location))
        except OSError as error:
            raise ValueError(
                f"{self.name} can no longer be read ({error.strerror}); put it back: a stream reads it once a pass"
            ) from error
        if version != self.version:
            raise ValueError(
                f"{self.name} has changed since the run began ({self.version} then, {version} now); put back what was "
                "there: a stream reads it once a pass"
            )

    def records(self, start: int) -> Iterator[Record]:
        """Yield the records that pass the filter, starting at number ``start``.

        Raises:
            ValueError: the first bad line, with its place; or the shard can't be read.
        """
        chosen = self.source.filter
        for record in self.as_written(start):
            if self.source.columns:
                record = replace(record, value=with_our_names(record.value, self.source))
            if chosen is None or self.source.value_of(record, chosen[0]) == chosen[1]:
                yield record

    def as_written(self, start: int) -> Iterator[Record]:
        """Yield all records from number ``start`` on, their columns under their own names. Raises as ``records``."""
        if self.part is None:
            return read_file(Path(self.source.location), self.name, _First(self.name), start)
        return self._hub_records(start)

    def row_id(self, number: int) -> int:
        """Return the id of a record: the same in every pass, run and process."""
        return (self.number << ROW_BITS) + number

    def _hub_records(self, start: int) -> Iterator[Record]:
        assert self.part is not None
        data = _open_hub(self.source.location)[0]
        part = data.shard(num_shards=data.num_shards, index=self.part).skip(start)
        try:
            for number, value in enumerate(part, start):
                yield Record(number, f"{self.name}[{number}]", without_gaps(dict(value)))
        # As in ``records``: a dozen types from several libraries.
        except Exception as error:
            raise ValueError(unreachable(self.name, error)) from error


class _First(Problems):
    """Raises the first problem: a stream can't collect all, since it may never read the data to the end."""

    def add(self, message: str) -> None:
        raise ValueError(message)


def list_shards(sources: str | Sequence[str], columns: Mapping[str, str] | None = None) -> list[Shard]:
    """Return the shards of the sources, in their order; those of a folder or glob are sorted by path.

    Args:
        sources: a file, a folder, a glob, or a hub data set, each with or without ``#field=value``; or several.
        columns: as in ``Source``.

    Raises:
        ValueError: sources have no readable file, or the hub can't be reached; one error lists all such sources.
    """
    shards: list[Shard] = []
    problems = []
    for entry in [sources] if isinstance(sources, str) else sources:
        try:
            for name, source, version, part in _parts(parse_source(entry, columns)):
                shards.append(Shard(len(shards), name, source, version, part))
        except ValueError as error:
            problems.append(str(error))
    double = _first_double([shard.name for shard in shards])
    if double:
        problems.append(f"{double} is in two of the sources; name it once")
    if problems:
        raise ValueError("; ".join(problems))
    return shards


def absent_columns(shards: Sequence[Shard], first: int) -> list[str]:
    """Return a sentence for each source of whose columns one is in none of its first records.

    Args:
        shards: as listed.
        first: records of each source that are looked at.

    Raises:
        ValueError: as ``Shard.records``.
    """
    found = []
    for source, own in groupby(shards, key=lambda shard: replace(shard.source, location="")):
        if not source.columns or is_text(shards[0].source.location):
            continue
        records = islice((record for shard in own for record in shard.as_written(0)), first)
        there = list(dict.fromkeys(key for record in records for key in record.value))
        missing = set(source.columns.values()) - set(there)
        if there and missing:
            found.append(no_column(source, missing, there, f"none of the first {first} records"))
    return found


def read_shard_rows(shard: Shard, start: int) -> Iterator[tuple[int, Row]]:
    """Yield (number, row) of a shard's instruction rows, starting at record ``start``.

    Raises:
        ValueError: as ``Shard.records``, or a record that is no row.
    """
    if is_text(shard.source.location):
        raise ValueError(f"{shard.name} is plain text, which has no instruction rows; use data=text")
    for record in shard.records(start):
        yield record.number, parse_row(record.value, record.where, shard.row_id(record.number))
        _note_unread(shard, record)


def read_shard_texts(shard: Shard, start: int) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of a shard's documents, starting at number ``start``; see ``read_texts``.

    Raises:
        ValueError: as ``Shard.records``, or a record without a text.
    """
    if is_text(shard.source.location):
        numbered = enumerate(documents(Path(shard.source.location), shard.name))
        yield from dropwhile(lambda document: document[0] < start, numbered)
        return
    for record in shard.records(start):
        yield record.number, text_of(record)


def _parts(source: Source) -> Iterator[tuple[str, Source, str, int | None]]:
    """Yield (name, source, version, part) of the shards of one source."""
    if is_hub_id(source.location):
        data, version = _open_hub(source.location)
        for part in range(data.num_shards):
            yield f"{source.location} (shard {part} of {data.num_shards})", source, version, part
        return
    for path in source_files(source.location):
        if is_text(str(path)) and source.filter is not None:
            raise ValueError(f"{source.entry}: a plain text file has no records to choose from; remove the filter")
        yield str(path), replace(source, location=str(path)), _version(path), None


def _version(path: Path) -> str:
    return f"{path.stat().st_size} bytes"


def _first_double(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


@cache
def _open_hub(name: str) -> tuple[Any, str]:
    """Return the train split of a hub data set in its streamed form, and its version."""
    import datasets

    try:
        only_local = datasets.DownloadConfig(local_files_only=not hub_reachable())
        builder = datasets.load_dataset_builder(name, download_config=only_local)
        return builder.as_streaming_dataset(split="train"), str(builder.hash)
    except Exception as error:
        raise ValueError(unreachable(name, error)) from error


def _note_unread(shard: Shard, record: Record) -> None:
    filtered = None if shard.source.filter is None else shard.source.filter[0]
    for key in unread_keys(record.value):
        if key != filtered:
            warn_once(f"{shard.source.entry}: the key {key} is not read (first seen at {record.where})")
