"""Reads records from one file: JSON lines, JSON, CSV and TSV, Parquet, Arrow; and lines from a text file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import Any

import numpy as np

#: An error shows at most this many causes of bad lines.
SHOWN_PROBLEMS = 10
#: Maximum places shown per cause.
_SHOWN_PLACES = 3
#: Compression of text files; Parquet and Arrow have their own.
COMPRESSIONS = ("", ".gz", ".zst")
#: Rows of a Parquet file in memory at once.
_BATCH = 1_000
#: Start of an escaped character in JSON.
_ESCAPE = "\\u"
#: How files begin that are often named .jsonl or .csv by mistake -> what they are.
_FIRST_BYTES = {
    b"PAR1": "it is Parquet; rename it to .parquet",
    b"ARROW1": "it is Arrow; rename it to .arrow",
    b"\x1f\x8b": "it is compressed with gzip; add .gz to its name",
    b"\x28\xb5\x2f\xfd": "it is compressed with Zstandard; add .zst to its name",
    b"\xff\xfe": "it is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
}
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True)
class Record:
    """One record with its 0-based number and its place (file:line) for error messages."""

    number: int
    where: str
    value: dict[str, Any]


@dataclass
class Problems:
    """Collects the bad lines of one source, so that all are reported at once."""

    name: str
    messages: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        """Record one bad line."""
        self.messages.append(message)

    @contextmanager
    def noting(self, kind: type[ValueError]) -> Iterator[None]:
        """Note an error of this kind, and continue."""
        try:
            yield
        except kind as error:
            self.messages.append(str(error))

    def raise_any(self) -> None:
        """Raise a ValueError if there were bad lines."""
        if not self.messages:
            return
        # Group places by cause: most often, every line has the same one.
        causes: dict[str, list[str]] = {}
        for message in self.messages:
            place, colon, cause = message.partition(": ")
            causes.setdefault(colon + cause or message, []).append(place)
        lines = [cause if cause == places[0] else _listed(places) + cause for cause, places in causes.items()]
        shown = "\n  ".join(lines[:SHOWN_PROBLEMS])
        more = len(lines) - SHOWN_PROBLEMS
        rest = f"\n  and {more} more" if more > 0 else ""
        raise ValueError(f"{self.name}: {len(self.messages)} bad record(s):\n  {shown}{rest}")


def _listed(places: list[str]) -> str:
    more = len(places) - _SHOWN_PLACES
    return ", ".join(places[:_SHOWN_PLACES]) + (f" and {more} more" if more > 0 else "")


def read_file(path: Path, name: str, problems: Problems, start: int = 0) -> Iterator[Record]:
    """Iterate over the records of a file.

    Records are numbered from 0: by their lines in ``.jsonl`` files, else by their order.

    Args:
        path: the file.
        name: its name in messages; the suffix gives the format.
        problems: collects the lines that are not records.
        start: number of the first record to read; earlier JSON lines are not parsed, and earlier Parquet row groups
            not read.

    Raises:
        ValueError: the file can't be read, or its content does not match its name.
    """
    kind = kind_of(name)
    if kind == ".jsonl":
        return _jsonl_records(path, name, problems, start)
    if kind == ".parquet":
        return _parquet_records(path, name, problems, start)
    return dropwhile(lambda record: record.number < start, _READERS[kind](path, name, problems))


def kind_of(name: str) -> str:
    """Return the format that a file's name ends in, such as ``.jsonl``, without its compression; "" if unknown."""
    return next((kind for kind, endings in KINDS.items() if name.endswith(endings)), "")


def read_lines(path: Path, name: str) -> Iterator[str]:
    """Yield the lines of a text file, compressed or not, without line ends. Raise a ValueError if it can't be read."""
    for line in _raw_lines(path, name, newline="\n"):
        yield line.rstrip("\r\n")


def _raw_lines(path: Path, name: str, newline: str) -> Iterator[str]:
    number = 0
    try:
        with _open(path, newline) as stream:
            for number, line in enumerate(stream, 1):  # noqa: B007
                yield line
    except UnicodeDecodeError as error:
        what = _kind_inside(path) or (
            f"near line {number + 1} is text that is not UTF-8 ({error.reason}); save it as UTF-8 (iconv -f "
            f"WINDOWS-1252 -t UTF-8, where a spreadsheet wrote it)"
        )
        raise ValueError(f"cannot read {name}: {what}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {name}: {error}") from error


def _kind_inside(path: Path) -> str:
    """Say what a file that is no UTF-8 text is by its first bytes, and what to do; "" if they don't tell."""
    with _open_bytes(path) as stream:
        head = stream.read(max(map(len, _FIRST_BYTES)))
    return next((what for first, what in _FIRST_BYTES.items() if head.startswith(first)), "")


def _open(path: Path, newline: str) -> io.TextIOWrapper:
    stream = _open_bytes(path)
    # utf-8-sig: Windows editors put a byte order mark, which is not text, at the start of a file.
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def _open_bytes(path: Path) -> Any:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(path)
    if path.name.endswith(".zst"):
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb")


def _jsonl_records(path: Path, name: str, problems: Problems, start: int = 0) -> Iterator[Record]:
    for number, line in islice(enumerate(read_lines(path, name)), start, None):
        where = f"{name}:{number + 1}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add(f"{where}: not JSON: {error.msg} (column {error.colno})")
            continue
        # A number of more than 4300 digits, brackets a thousand deep.
        except (ValueError, RecursionError) as error:
            problems.add(f"{where}: not readable as JSON: {error}")
            continue
        yield from as_record(number, where, value, problems, escapes=_ESCAPE in line)


def _json_records(path: Path, name: str, problems: Problems) -> Iterator[Record]:
    text = "\n".join(read_lines(path, name))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1 and error.colno == 1:
            # Several objects, one a line, under the name of .json.
            yield from _jsonl_records(path, name, problems)
            return
        raise ValueError(f"{name}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{name}: not readable as JSON: {error}") from error
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    if isinstance(values, dict):
        keys = ", ".join(map(str, list(values)[:SHOWN_PROBLEMS])) or "none"
        raise ValueError(
            f"{name}: expected a JSON list of records, or an object with such a list under 'data'; it has an object "
            f"with the keys {keys}"
        )
    if not isinstance(values, list):
        raise ValueError(f"{name}: expected a JSON list of records, got {type(values).__name__}")
    escapes = _ESCAPE in text
    for number, value in enumerate(values):
        yield from as_record(number, f"{name}[{number}]", value, problems, escapes)


def as_record(number: int, where: str, value: Any, problems: Problems, escapes: bool) -> Iterator[Record]:
    """Yield the value as a record. Report it to ``problems`` if it is not an object, or has half characters.

    Args:
        number, where: of the record.
        value: the parsed JSON.
        problems: collects the errors.
        escapes: True if the JSON has escaped characters, the only way to write half a character.
    """
    if not isinstance(value, dict):
        problems.add(f"{where}: expected a JSON object, got {type(value).__name__}")
        return
    broken = [key for key, part in value.items() if _has_surrogate([key, part])] if escapes else []
    for key in broken:
        problems.add(
            f"{where}: {key!a} has half a character (a lone surrogate, such as \\ud83d, of a text that was cut inside "
            f"an emoji), which is not valid Unicode; write the whole character, or remove it"
        )
    if not broken:
        yield Record(number, where, value)


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return True
        return False
    if isinstance(value, dict):
        return any(_has_surrogate(part) for pair in value.items() for part in pair)
    return isinstance(value, list) and any(map(_has_surrogate, value))


def _csv_records(path: Path, name: str, problems: Problems) -> Iterator[Record]:
    lines = _raw_lines(path, name, newline="")
    head: list[str] = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    separators = [mark for mark in _DELIMITERS if head and mark in head[-1]]
    delimiter = separators[0] if separators else ","
    if name.endswith(KINDS[".tsv"]):
        delimiter = "\t"
    # A cell holds a whole document; the default limit is 128 KiB.
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(chain(head, lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    number, start = 0, 1
    try:
        for cells in rows:
            where, start = f"{name}:{start}", rows.line_num + 1
            if not header:
                if not any(cell.strip() for cell in cells):
                    continue
                header = _header(cells, where)
            elif len(cells) == len(header):
                # An empty cell is no text; anything else is, be it "NaN" or "42".
                value = {key: cell or None for key, cell in zip(header, cells, strict=True)}
                yield Record(number, where, value)
                number += 1
            elif cells:
                marks = _DELIMITERS[delimiter]
                problems.add(
                    f"{where}: {len(cells)} cells, separated by {marks}, but the header has {len(header)} "
                    f"({', '.join(header)}); put cells with {marks} or line ends in double quotes"
                )
                number += 1
    except csv.Error as error:
        raise ValueError(f"{name}:{start}: not readable as CSV: {error}") from error


def _header(cells: list[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    double = next((cell for cell in header if header.count(cell) > 1), None)
    if double is not None:
        raise ValueError(f"{where}: the header has the column {double!r} twice; columns: {', '.join(header)}")
    return header


def _parquet_records(path: Path, name: str, problems: Problems, start: int = 0) -> Iterator[Record]:
    import pyarrow.parquet

    with _reading(name), pyarrow.parquet.ParquetFile(path) as file:
        ends = np.cumsum([file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)], dtype=np.int64)
        group = int(np.searchsorted(ends, start, side="right"))
        batches = file.iter_batches(batch_size=_BATCH, row_groups=list(range(group, file.num_row_groups)))
        records = _arrow_records(lambda: next(batches, None), name, int(ends[group - 1]) if group else 0)
        yield from dropwhile(lambda record: record.number < start, records)


def _arrow_file_records(path: Path, name: str, problems: Problems) -> Iterator[Record]:
    import pyarrow

    with _reading(name), pyarrow.memory_map(str(path)) as source:
        try:
            file = pyarrow.ipc.open_file(source)
            batches = iter([file.get_batch(number) for number in range(file.num_record_batches)])
        except pyarrow.ArrowInvalid:
            # The streamed form, which ``datasets`` writes.
            batches = iter(pyarrow.ipc.open_stream(source))
        yield from _arrow_records(lambda: next(batches, None), name)


def _arrow_records(next_batch: Callable[[], Any], name: str, number: int = 0) -> Iterator[Record]:
    while (batch := next_batch()) is not None:
        for value in batch.to_pylist():
            yield Record(number, f"{name}[{number}]", without_gaps(value))
            number += 1


@contextmanager
def _reading(name: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {name}: {str(error).strip()[:200]}") from error


def without_gaps(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of a typed table without the nulls that the column types add.

    There, all turns of a column have the same keys, and so do the arguments of all tools; keys that a turn lacks are
    null. A missing number is NaN.
    """
    return {key: None if _is_nan(value) else _dense(value) for key, value in record.items()}


def _dense(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dense(part) for key, part in value.items() if part is not None}
    return [_dense(part) for part in value] if isinstance(value, list) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


_READERS: dict[str, Callable[[Path, str, Problems], Iterator[Record]]] = {
    ".jsonl": _jsonl_records,
    ".json": _json_records,
    ".csv": _csv_records,
    ".tsv": _csv_records,
    ".parquet": _parquet_records,
    ".arrow": _arrow_file_records,
}
#: Format -> endings of its files.
KINDS: dict[str, tuple[str, ...]] = {
    **{kind: tuple(kind + end for end in COMPRESSIONS) for kind in (".jsonl", ".json", ".csv", ".tsv", ".txt")},
    ".parquet": (".parquet",),
    ".arrow": (".arrow",),
}
