"""Reads records from local files, Hugging Face hub data sets, and single files of those."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltakd.io.home import expanded
from deltakd.io.hub import hub_reachable

RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
TEXT_SUFFIXES = (".txt", ".txt.gz")
#: An error shows at most this many bad lines of a file.
SHOWN_PROBLEMS = 10

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(r"(?P<id>[\w.-]+/[\w.-]+):(?P<file>.+)")


@dataclass(frozen=True)
class Source:
    """One entry of a list of sources.

    Args:
        entry: as the user wrote it.
        location: path, ``org/name`` or ``org/name:file``, without the filter.
        filter: (field, value) of ``#field=value``, or None.
    """

    entry: str
    location: str
    filter: tuple[str, str] | None


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
        """Note an error of this kind, and go on."""
        try:
            yield
        except kind as error:
            self.messages.append(str(error))

    def raise_any(self) -> None:
        """Raise a ValueError if there were bad lines."""
        if self.messages:
            shown = "\n  ".join(self.messages[:SHOWN_PROBLEMS])
            more = len(self.messages) - SHOWN_PROBLEMS
            rest = f"\n  and {more} more" if more > 0 else ""
            raise ValueError(f"{self.name}: {len(self.messages)} bad record(s):\n  {shown}{rest}")


def parse_source(entry: str) -> Source:
    """Split ``location#field=value``. Raise a ValueError if what follows ``#`` is not such a filter."""
    location, mark, condition = entry.partition("#")
    if not mark:
        return Source(entry, location, None)
    name, equals, value = condition.partition("=")
    if not equals or not name or not location:
        raise ValueError(
            f"source {entry!r}: what follows # must be field=value (a subset of line numbers goes into the key "
            f"`subset`)"
        )
    return Source(entry, location, (name, value))


def is_text(location: str) -> bool:
    """True if the location is a plain text file."""
    return location.endswith(TEXT_SUFFIXES)


def missing_sources(sources: Mapping[str, str | Sequence[str] | None]) -> list[str]:
    """Return the problems visible without opening anything: malformed sources and missing local files.

    Args:
        sources: config key -> source(s), or None.

    Returns:
        One sentence per problem, beginning with the key.
    """
    found = []
    for key, entries in sources.items():
        for entry in [entries] if isinstance(entries, str) else entries or ():
            try:
                _check_exists(parse_source(entry).location)
            except ValueError as error:
                found.append(f"{key}: {error}")
    return found


def _check_exists(location: str) -> None:
    if not _is_hub_id(location) and (os.path.exists(expanded(location)) or not _HUB_FILE.fullmatch(location)):
        local_path(location)


def iter_records(source: Source, problems: Problems) -> Iterator[Record]:
    """Iterate over all records of a source, unfiltered; lines that are not JSON objects go to ``problems``.

    Raises:
        ValueError: the file is missing, unreadable or of an unknown kind, or the hub cannot be reached.
    """
    if _is_hub_id(source.location):
        return _hub_records(source.location)
    path = local_path(source.location)
    name = source.location
    if name.endswith(".json"):
        return _json_records(path, name, problems)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl_records(path, name, problems)
    raise ValueError(_unknown(name))


def local_path(location: str) -> Path:
    """Return the local file of a location; ``org/name:file`` comes from the hub or its local cache."""
    path = expanded(location)
    if os.path.exists(path):
        if path.is_dir():
            raise ValueError(f"{location} is a folder; name a file in it ({_known()})")
        return path
    hub_file = _HUB_FILE.fullmatch(location)
    if hub_file:
        return _hub_file(hub_file["id"], hub_file["file"])
    if not location.endswith(RECORD_SUFFIXES + TEXT_SUFFIXES):
        raise ValueError(_unknown(location))
    raise ValueError(f"no such file: {location} (looked in {Path.cwd()}); give an existing path or a hub data set")


def read_lines(path: Path, name: str) -> Iterator[str]:
    """Yield the lines of a text file, gzipped or not, without line ends. Raise a ValueError if it cannot be read."""
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        # utf-8-sig: editors of Windows put a byte order mark at the start of a file; it is no text.
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as stream:
            for line in stream:
                yield line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"cannot read {name}: {error}") from error


def _known() -> str:
    return ", ".join(RECORD_SUFFIXES + TEXT_SUFFIXES)


def _unknown(location: str) -> str:
    return f"unknown kind of source: {location!r}; allowed: files ({_known()}), org/name, org/name:file of the hub"


def _is_hub_id(location: str) -> bool:
    known = location.endswith(RECORD_SUFFIXES + TEXT_SUFFIXES)
    return bool(_HUB_ID.fullmatch(location)) and not known and not os.path.exists(location)


def _as_record(number: int, where: str, value: Any, problems: Problems) -> Iterator[Record]:
    if not isinstance(value, dict):
        problems.add(f"{where}: expected a JSON object, got {type(value).__name__}")
        return
    broken = [key for key, part in value.items() if _has_surrogate([key, part])]
    for key in broken:
        problems.add(
            f"{where}: {key!a} has half a character (a lone surrogate, such as \\ud83d, of a text that was cut inside "
            f"an emoji), which is no Unicode text; write the whole character, or remove it"
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


def _jsonl_records(path: Path, name: str, problems: Problems) -> Iterator[Record]:
    for number, line in enumerate(read_lines(path, name)):
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
        yield from _as_record(number, where, value, problems)


def _json_records(path: Path, name: str, problems: Problems) -> Iterator[Record]:
    try:
        values = json.loads("\n".join(read_lines(path, name)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{name}: not readable as JSON: {error}") from error
    if not isinstance(values, list):
        raise ValueError(f"{name}: expected a JSON list of records, got {type(values).__name__}")
    for number, value in enumerate(values):
        yield from _as_record(number, f"{name}[{number}]", value, problems)


def _hub_records(name: str) -> Iterator[Record]:
    import datasets

    try:
        only_local = datasets.DownloadConfig(local_files_only=not hub_reachable())
        table = datasets.load_dataset(name, split="train", download_config=only_local)
    # The hub's client raises a dozen types from several libraries; the user needs one line and a remedy.
    except Exception as error:
        raise ValueError(_unreachable(name, error)) from error
    for number, value in enumerate(table):
        yield Record(number, f"{name}[{number}]", dict(value))


def _hub_file(name: str, file: str) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.hf_hub_download(name, file, repo_type="dataset", local_files_only=not hub_reachable())
        )
    except Exception as error:
        raise ValueError(_unreachable(f"{name}:{file}", error)) from error


def _unreachable(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0][:200]
    return (
        f"cannot load data set {name!r} from the hub ({type(error).__name__}: {reason}); download it once and give "
        f"the path of a local file ({_known()}) instead"
    )
