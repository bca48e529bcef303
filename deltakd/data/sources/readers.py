"""Reads instruction rows and plain-text documents from files and hub data sets.

A source is a file (JSON lines, JSON, CSV, TSV, Parquet, Arrow; for texts also ``.txt``; all but Parquet and Arrow also
compressed: ``.gz``, ``.zst``), a folder or glob of such files (``data/*.parquet``), a folder that
``Dataset.save_to_disk`` wrote, a hub data set ``org/name`` (its train split), or one file of it,
``org/name:file.jsonl``. ``source#field=value`` keeps the records whose field has that value. A subset
``split.json#train`` keeps the 0-based line numbers that the file lists under that key; in formats without lines, these
are record numbers.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from deltakd.data.sources.messages import whole_characters
from deltakd.data.sources.parsing import parse_row, unread_keys
from deltakd.data.sources.records import (
    Problems,
    Record,
    Source,
    is_text,
    iter_records,
    parse_source,
    read_lines,
    source_files,
)
from deltakd.data.sources.rows import Row
from deltakd.io.home import expanded

log = logging.getLogger(__name__)

DOCUMENT_END = "<|endoftext|>"


def read_rows(
    source: str | Sequence[str],
    *,
    subset: str | Mapping[str, str] | None = None,
    need_response: bool = True,
    strip_answers: str | None = None,
    columns: Mapping[str, str] | None = None,
    need_columns: bool = True,
    limit: int | None = None,
) -> list[Row]:
    """Return the rows that ``iter_rows`` yields.

    Raises:
        ValueError: as ``iter_rows``.
    """
    options: dict[str, Any] = {"subset": subset, "need_response": need_response, "strip_answers": strip_answers}
    options |= {"columns": columns, "need_columns": need_columns}
    return list(iter_rows(source, limit=limit, **options))


def iter_rows(
    source: str | Sequence[str],
    *,
    subset: str | Mapping[str, str] | None = None,
    need_response: bool = True,
    strip_answers: str | None = None,
    columns: Mapping[str, str] | None = None,
    need_columns: bool = True,
    limit: int | None = None,
) -> Iterator[Row]:
    """Read instruction rows, one after the other.

    Args:
        source: one source or several, read in order.
        subset: ``split.json#key`` for a single source, or a mapping from source (as written) to subset.
        need_response: True if a row without an answer is an error.
        strip_answers: a regular expression; matches are removed from answers (not from conversations).
        columns: our name of a column (one of ``COLUMNS``) -> its name in the sources.
        need_columns: False for sources that may use other column names; see ``Source``.
        limit: keep only the first ``limit`` rows (for debugging; the rest is not read).

    Yields:
        Rows whose ids are 0-based line numbers, counted over the concatenation of all sources.

    Raises:
        ValueError: a source cannot be read, lacks a column, has bad lines (reported together, after its rows), or has
            no rows left.
    """
    found = 0
    first = 0
    entries = _entries(source)
    subsets = _subsets(subset, entries)
    for entry in entries:
        reader = _Reader(parse_source(entry, columns, need_columns), subsets.get(entry))
        for record in reader:
            if limit is not None and found >= limit:
                break
            try:
                row = parse_row(record.value, record.where, first + record.number, need_response)
                reader.note_unread(record)
                row = _stripped(row, strip_answers, record.where) if strip_answers else row
            except ValueError as error:
                reader.problems.add(str(error))
                continue
            found += 1
            yield row
        reader.problems.raise_any()
        reader.report_unread()
        first += reader.last + 1


def _stripped(row: Row, pattern: str, where: str) -> Row:
    stripped = tuple(text for text in (re.sub(pattern, "", answer) for answer in row.responses) if text.strip())
    if row.responses and not stripped:
        raise ValueError(f"{where}: data.strip_answers={pattern} leaves nothing of the answer")
    return replace(row, responses=stripped)


def read_texts(
    source: str | Sequence[str],
    *,
    subset: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[str]:
    """Read plain-text documents for pre-training.

    A text file is split at lines that are exactly ``<|endoftext|>``. A record's document is its ``text`` field, or, for
    an instruction row, the lines instruction, input and first response.

    Args:
        source: one source or several.
        subset: source (as written) -> ``split.json#key``, for sources of records.
        columns: as for ``iter_rows``; text files have none.
        limit: keep only the first ``limit`` documents.

    Raises:
        ValueError: as ``read_rows``.
    """
    entries = _entries(source)
    subsets = _subsets(subset, entries)
    texts: list[str] = []
    for entry in entries:
        texts.extend(_texts_of(parse_source(entry, columns), subsets.get(entry)))
        if limit is not None and len(texts) >= limit:
            return texts[:limit]
    return texts


def _entries(source: str | Sequence[str]) -> list[str]:
    entries = [source] if isinstance(source, str) else list(source)
    if not entries:
        raise ValueError("no data source given; name at least one file or hub data set")
    if len(set(entries)) != len(entries):
        double = next(entry for entry, count in Counter(entries).items() if count > 1)
        raise ValueError(f"source {double!r} is given twice; remove one")
    return entries


def _subsets(subset: str | Mapping[str, str] | None, entries: Sequence[str]) -> Mapping[str, str]:
    if subset is None:
        return {}
    if isinstance(subset, str):
        if len(entries) > 1:
            raise ValueError(
                f"subset {subset!r} cannot tell which of {len(entries)} sources it cuts; give a mapping from source "
                f"to subset"
            )
        return {entries[0]: subset}
    unknown = sorted(set(subset) - set(entries))
    if unknown:
        raise ValueError(f"subset names unknown source(s) {unknown}; sources are {list(entries)}")
    return subset


def read_subset(subset: str) -> set[int]:
    """Return the 0-based line numbers that ``split.json#key`` lists, without nulls.

    Raises:
        ValueError: no such file or key, or the key does not hold a list of line numbers.
    """
    name, mark, key = subset.rpartition("#")
    if not mark or not name or not key:
        raise ValueError(f"subset {subset!r} must be file.json#key, such as split.json#train")
    try:
        splits = json.loads(expanded(name).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read subset file {name}: {error}") from error
    keys = [k for k, v in splits.items() if isinstance(v, list)] if isinstance(splits, dict) else []
    if key not in keys:
        raise ValueError(f"subset {subset!r}: {name} has no list {key!r}; it has: {', '.join(keys) or 'none'}")
    numbers = [number for number in splits[key] if number is not None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"subset {subset!r}: the list must hold line numbers from 0 (or null)")
    return set(numbers)


class _Reader:
    """Iterates over the records of one source that pass its filter and subset, and collects the problems."""

    def __init__(self, source: Source, subset: str | None) -> None:
        self.problems = Problems(source.entry)
        self.last = -1
        self._source = source
        self._subset = subset
        self._lines = None if subset is None else read_subset(subset)
        self._unread: Counter[str] = Counter()

    def note_unread(self, record: Record) -> None:
        """Count the keys of a record that are never read; the filter reads its field."""
        filtered = None if self._source.filter is None else self._source.filter[0]
        self._unread.update(key for key in unread_keys(record.value) if key != filtered)

    def report_unread(self) -> None:
        """Warn of them, once per file."""
        if self._unread:
            warn_once(f"{self._source.location}: these keys are not read: {_counted(self._unread)}")

    def __iter__(self) -> Iterator[Record]:
        kept = 0
        seen: Counter[str] = Counter()
        for record in iter_records(self._source, self.problems):
            self.last = record.number
            if self._passes(record, seen):
                kept += 1
                yield record
        if not kept and not self.problems.messages:
            raise ValueError(self._nothing(seen))
        self._check_subset()

    def _passes(self, record: Record, seen: Counter[str]) -> bool:
        if self._lines is not None and record.number not in self._lines:
            return False
        if self._source.filter is None:
            return True
        field, wanted = self._source.filter
        value = self._source.value_of(record, field)
        seen[value] += 1
        return value == wanted

    def _check_subset(self) -> None:
        beyond = max(self._lines, default=-1) if self._lines is not None else -1
        if beyond > self.last and not self.problems.messages:
            raise ValueError(
                f"subset {self._subset!r} names line {beyond}, but {self._source.entry} ends at line {self.last}: it "
                f"was made for another file"
            )

    def _nothing(self, seen: Counter[str]) -> str:
        entry = self._source.entry
        if self.last < 0:
            return f"{entry} is empty; give a data set with at least one record"
        if not seen:
            return f"{entry}: the subset {self._subset!r} keeps none of its {self.last + 1} lines"
        field, wanted = self._source.filter or ("", "")
        values = ", ".join(value for value, _ in seen.most_common(10))
        return f"{entry}: no record has {field} = {wanted!r}; values found: {values}"


@cache
def warn_once(message: str) -> None:
    """Warn once per process, which may read an evaluation's sets several times."""
    log.warning("%s.", message)


def _counted(keys: Counter[str]) -> str:
    return ", ".join(f"{key} ({count} row{'' if count == 1 else 's'})" for key, count in sorted(keys.items()))


def _texts_of(source: Source, subset: str | None) -> list[str]:
    if is_text(source.location):
        if subset is not None or source.filter is not None:
            raise ValueError(
                f"{source.entry}: a plain text file has no records to choose from; remove subset and filter"
            )
        files = source_files(source.location)
        names = [source.location] if len(files) == 1 else map(str, files)
        return [text for file, name in zip(files, names, strict=True) for text in documents(file, name)]
    reader = _Reader(source, subset)
    texts = []
    for record in reader:
        try:
            texts.append(text_of(record))
        except ValueError as error:
            reader.problems.add(str(error))
    reader.problems.raise_any()
    return texts


def text_of(record: Record) -> str:
    """Return a record's document. Raise a ValueError if it has none."""
    text = record.value.get("text")
    if text is None:
        return parse_row(record.value, record.where, record.number, need_response=True).text
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{record.where}: text must be a non-empty string, got {text!r:.60}")
    return whole_characters(text, record.where, "text")


def documents(path: Path, name: str) -> Iterator[str]:
    """Yield the documents of a text file. Raise a ValueError if it can't be read, or holds no text."""
    found = False
    lines: list[str] = []
    for line in chain(read_lines(path, name), [DOCUMENT_END]):
        if line != DOCUMENT_END:
            lines.append(line)
            continue
        document = "\n".join(lines).strip("\n")
        if document.strip():
            found = True
            yield document
        lines = []
    if not found:
        raise ValueError(f"{name} is empty; give a file with text")
