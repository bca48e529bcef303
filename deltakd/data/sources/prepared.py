"""Caches rows of sources on disk, valid while neither the sources nor the code that reads them change."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltakd.data.sources.readers import iter_rows
from deltakd.data.sources.records import hub_files, parse_source, source_files
from deltakd.data.sources.rows import Row
from deltakd.data.sources.stored_rows import StoredRows, reading_code, store_rows
from deltakd.io.home import expanded
from deltakd.io.progress import progress_bar

#: Reading fewer rows than this takes seconds and needs no progress bar.
LONG_READ = 20_000
_CHUNK = 1 << 20


def prepared_rows(
    source: str | Sequence[str],
    *,
    subset: str | Mapping[str, str] | None = None,
    strip_answers: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    need_response: bool = True,
    cache_dir: str | Path | None = None,
) -> tuple[StoredRows, str | None]:
    """Read rows, or reuse those that an earlier run has stored.

    Args:
        source, subset, strip_answers, columns, limit, need_response: as for ``iter_rows``.
        cache_dir: folder that keeps the rows for later runs; None: they are only in a temporary place.

    Returns:
        The rows, and a key that identifies them (64 hex digits); None if changes in the source can't be detected.

    Raises:
        ValueError: as ``read_rows``.
    """
    options: dict[str, Any] = {"subset": subset, "strip_answers": strip_answers, "limit": limit}
    options |= {"columns": dict(columns or {}), "need_response": need_response}
    key = reading_key(source, **options)

    def read() -> Iterator[Row]:
        total = _records(source)
        with progress_bar("reading rows", total or 0, (total or 0) >= LONG_READ) as advance:
            for row in iter_rows(source, **options):
                if row.id % 1_000 == 0:
                    advance(row.id)
                yield row

    return store_rows(read(), f"rows-{key}", None if key is None else cache_dir), key


def reading_key(source: str | Sequence[str], **options: Any) -> str | None:
    """Return the sha256 of sources and reading options; None if a source has no files on this machine.

    It depends on the content of files, not their times: a copied or rewritten file counts as the same, and a change
    that keeps size and time is detected.

    Args:
        source: one source or several.
        options: ``subset``, ``columns`` and anything else that the rows depend on; must be JSON.
    """
    sources = [source] if isinstance(source, str) else list(source)
    subset = options.get("subset") or {}
    listed = [subset] if isinstance(subset, str) else list(subset.values())
    found = [_files_of(entry) for entry in sources]
    files = [file for one in found for file in one or ()] + [expanded(entry.rpartition("#")[0]) for entry in listed]
    if None in found or not all(file.is_file() for file in files):
        return None
    # The name's ending says how to read a file.
    parts = [reading_code(), sources, options, [(file.name, file_sha256(file)) for file in files]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _files_of(entry: str) -> list[Path] | None:
    try:
        location = parse_source(entry).location
        return hub_files(location) or source_files(location)
    except ValueError:
        # The reader says what is wrong.
        return None


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _records(source: str | Sequence[str]) -> int | None:
    """Return the number of records in sources of line-based files or Parquet; None if there are other kinds."""
    found = [_files_of(entry) for entry in ([source] if isinstance(source, str) else source)]
    files = [file for one in found for file in one or [Path()]]
    if not all(file.name.endswith((".jsonl", ".jsonl.gz", ".parquet")) for file in files):
        return None
    try:
        return sum(map(_lines, files))
    except (OSError, EOFError, ValueError):
        # The reader says what is wrong.
        return None


def _lines(file: Path) -> int:
    if file.suffix == ".parquet":
        from pyarrow.parquet import read_metadata

        return int(read_metadata(file).num_rows)
    opener: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(_CHUNK), b""))
