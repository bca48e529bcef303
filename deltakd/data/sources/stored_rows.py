"""Rows on disk: read once from their sources, then accessed by number, so a million rows take no memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, final, overload

import numpy as np
from numpy.typing import NDArray

from deltakd.data.sources.rows import Row
from deltakd.data.sources.tasks import Tasks, task_digests
from deltakd.io.arrays import Arrays, ArrayWriter, kept_arrays

#: Rows written at once.
_BATCH = 1_000
_DTYPES = {"text": "u1", "ends": "<i8", "ids": "<i8", "instructions": "<u8", "inputs": "<u8", "talks": "|b1"}

#: The parts of a row. Its place is only for messages.
_FIELDS = sorted(field.name for field in fields(Row) if field.compare)
_ENCODER = json.JSONEncoder(ensure_ascii=False)


@cache
def reading_code() -> str:
    """Return the sha256 of this package's code: rows stored by different code are read again."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def row_bytes(row: Row) -> bytes:
    """Return a row as JSON, without its place; equal rows have equal bytes."""
    return _ENCODER.encode({name: getattr(row, name) for name in _FIELDS}).encode("utf-8", "surrogatepass")


def rows_digest(rows: Sequence[Row]) -> str:
    """Return the sha256 of rows, in order, as 64 hex digits."""
    if isinstance(rows, StoredRows):
        return rows.digest()
    return _digest(map(row_bytes, rows))


def holds_images(rows: Sequence[Row]) -> bool:
    """Return True if some row holds an image."""
    if isinstance(rows, StoredRows) and not rows.may_hold_images:
        return False
    return any(row.images for row in rows)


def tasks_of(rows: Sequence[Row]) -> Tasks:
    return rows.tasks if isinstance(rows, StoredRows) else task_digests(rows)


def taken(rows: Sequence[Row], places: NDArray[np.int64]) -> Sequence[Row]:
    """Return the rows at these places."""
    return rows.take(places) if isinstance(rows, StoredRows) else [rows[place] for place in places.tolist()]


def store_rows(
    rows: Iterable[Row], name: str = "rows", cache_dir: str | Path | None = None, advance: Callable[[int], object] = int
) -> StoredRows:
    """Write rows to disk, unless the folder of this name already has them.

    Args:
        rows: read only if there is no such folder.
        name: of the folder; identifies everything the rows depend on.
        cache_dir: as for ``kept_arrays``.
        advance: called with the number of rows so far.

    Raises:
        ValueError: as ``rows`` and ``kept_arrays``.
        WriteError: the disk failed.
    """

    def build(writer: ArrayWriter) -> None:
        waiting, done = iter(rows), 0
        while batch := list(islice(waiting, _BATCH)):
            _write(writer, batch, done)
            done += len(batch)
            advance(done)

    return StoredRows(kept_arrays(name, cache_dir, _DTYPES, build, "the rows"))


def _write(writer: ArrayWriter, batch: Sequence[Row], done: int) -> None:
    lines = [row_bytes(row) + b"\t" + row.where.encode("utf-8", "surrogatepass") for row in batch]
    start = writer.meta.setdefault("bytes", 0)
    ends = start + np.cumsum([len(line) for line in lines], dtype=np.int64)
    writer.meta["bytes"] = int(ends[-1])
    writer.append_bytes("text", b"".join(lines))
    writer.append("ends", ends)
    writer.append("ids", [row.id for row in batch])
    writer.meta["images"] = writer.meta.get("images", False) or any(row.images for row in batch)
    tasks = task_digests(batch)
    writer.append("instructions", tasks.instructions)
    writer.append("inputs", tasks.inputs)
    writer.append("talks", tasks.talks)


@final
class StoredRows(Sequence[Row]):
    """All or some rows of a folder written by ``store_rows``; each is read on demand.

    Args:
        stored: the folder's arrays.
        numbers: [n] int64 positions of the rows; None: all.
        digest: of exactly these rows, if known.
    """

    def __init__(self, stored: Arrays, numbers: NDArray[np.int64] | None = None, digest: str | None = None) -> None:
        self._stored = stored
        self._numbers = np.arange(len(stored.arrays["ids"])) if numbers is None else numbers
        self._digest = digest
        self._text = memoryview(stored.arrays["text"].data)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...
    def __getitem__(self, index: int | slice) -> Row | StoredRows:
        if isinstance(index, slice):
            return StoredRows(self._stored, self._numbers[index])
        return _parsed(self._line(int(self._numbers[index])))

    def __iter__(self) -> Iterator[Row]:
        return map(_parsed, self._lines())

    def take(self, places: NDArray[Any], digest: str | None = None) -> StoredRows:
        """Return the rows at these places (numbers or a mask), in this order."""
        return StoredRows(self._stored, self._numbers[places], digest)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """[n] positions of the rows in their folder."""
        return self._numbers

    @property
    def ids(self) -> NDArray[np.int64]:
        """[n] the rows' ids."""
        return self._of("ids")

    @property
    def may_hold_images(self) -> bool:
        """True if a row of their folder holds an image."""
        return bool(self._stored.meta.get("images"))

    @property
    def tasks(self) -> Tasks:
        """The digests of the rows' tasks."""
        return Tasks(self._of("instructions"), self._of("inputs"), self._of("talks"))

    def digest(self) -> str:
        """Return the sha256 of the rows, in their order; ``rows_digest`` of a list of them is the same."""
        if self._digest is None:
            self._digest = _digest(line[: line.index(b"\t")] for line in self._lines())
        return self._digest

    def _of(self, name: str) -> NDArray[Any]:
        return self._stored.arrays[name][self._numbers]

    def _lines(self) -> Iterator[bytes]:
        return map(self._line, self._numbers.tolist())

    def _line(self, number: int) -> bytes:
        ends = self._stored.arrays["ends"]
        return bytes(self._text[ends[number - 1] if number else 0 : ends[number]])


def _digest(lines: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line)
        digest.update(b"\n")
    return digest.hexdigest()


def _parsed(line: bytes) -> Row:
    contents, _, where = line.decode("utf-8", "surrogatepass").partition("\t")
    values: dict[str, Any] = json.loads(contents)
    for name, value in values.items():
        # A row has no lists of its own, only tuples, which JSON does not know.
        if isinstance(value, list):
            values[name] = tuple(value)
    return Row(where=where, **values)
