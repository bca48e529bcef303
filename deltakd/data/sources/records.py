"""Finds records in files, folders and globs of files, Hugging Face hub data sets, and single files of a data set."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltakd.data.sources.file_formats import (
    KINDS,
    Problems,
    Record,
    kind_of,
    read_file,
    read_lines,
    without_gaps,
)
from deltakd.io.home import expanded
from deltakd.io.hub import hub_reachable

__all__ = [
    "KINDS",
    "Problems",
    "Record",
    "Source",
    "is_text",
    "iter_records",
    "local_path",
    "missing_sources",
    "parse_source",
    "read_lines",
    "source_files",
]

TEXT_SUFFIXES = KINDS[".txt"]
RECORD_SUFFIXES = tuple(ending for kind, endings in KINDS.items() if kind != ".txt" for ending in endings)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(r"(?P<id>[\w.-]+/[\w.-]+):(?P<file>.+)")
#: Files that the hub's client and Arrow put next to the data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
#: Names of splits, in the names of files and folders.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
_SPLITS |= {"validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}


@dataclass(frozen=True)
class Source:
    """One entry of a list of sources.

    Args:
        entry: the text that the user wrote.
        location: path, ``org/name`` or ``org/name:file``, without the filter.
        filter: (field, value) of ``#field=value``, or None.
        columns: our name of a column -> its name in the source.
        need_columns: True if the source must have these columns; False if it may use other names: then they are read
            only from records without our name.
    """

    entry: str
    location: str
    filter: tuple[str, str] | None
    columns: Mapping[str, str] = field(default_factory=dict)
    need_columns: bool = True

    def value_of(self, record: Record, field: str) -> str:
        """Return the text of a field, by its name in the source, to be compared with a filter's."""
        ours = next((ours for ours, theirs in self.columns.items() if theirs == field), field)
        return str(record.value.get(field, record.value.get(ours, "(absent)")))


def parse_source(entry: str, columns: Mapping[str, str] | None = None, need_columns: bool = True) -> Source:
    """Split ``location#field=value``; the rest is as in ``Source``.

    Raises:
        ValueError: the text after ``#`` is not such a filter.
    """
    location, mark, condition = entry.partition("#")
    if not mark:
        return Source(entry, location, None, columns or {}, need_columns)
    name, equals, value = condition.partition("=")
    if not equals or not name or not location:
        raise ValueError(
            f"source {entry!r}: what follows # must be field=value (a subset of line numbers goes into the key "
            f"`subset`)"
        )
    return Source(entry, location, (name, value), columns or {}, need_columns)


def is_text(location: str) -> bool:
    """True if the location is a plain text file, or a folder or glob of them."""
    files = [location] if _is_one(location) else map(str, source_files(location))
    return all(kind_of(file) == ".txt" for file in files)


def missing_sources(sources: Mapping[str, str | Sequence[str] | None]) -> list[str]:
    """Return the problems that show without opening anything: malformed sources and missing local files.

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
    if not is_hub_id(location) and (os.path.exists(expanded(location)) or not _HUB_FILE.fullmatch(location)):
        source_files(location)


def iter_records(source: Source, problems: Problems) -> Iterator[Record]:
    """Iterate over all records of a source, unfiltered, with its columns renamed; bad lines go to ``problems``.

    The files of a folder or glob are read in order of their names; numbering continues from one to the next.

    Raises:
        ValueError: a file is missing, unreadable or of an unknown kind, or the hub cannot be reached; or no record has
            one of the columns.
    """
    missing = set(source.columns.values())
    there: dict[str, None] = {}
    last = -1
    for record in _located(source.location, problems):
        last = record.number
        if not source.columns:
            yield record
            continue
        missing -= record.value.keys()
        if missing:
            there |= dict.fromkeys(record.value)
        yield replace(record, value=with_our_names(record.value, source))
    if missing and last >= 0 and source.need_columns:
        raise ValueError(no_column(source, missing, list(there)))


def with_our_names(record: dict[str, Any], source: Source) -> dict[str, Any]:
    ours = {
        ours: theirs
        for ours, theirs in source.columns.items()
        if theirs in record and (source.need_columns or record.get(ours) in (None, ""))
    }
    kept = {key: value for key, value in record.items() if key not in ours.values()}
    return kept | {name: record[theirs] for name, theirs in ours.items()}


def no_column(source: Source, missing: set[str], there: Sequence[str], records: str = "no record") -> str:
    """Say which of a source's columns none of its records has, and which columns they have."""
    wanted = ", ".join(f"{ours}: {theirs}" for ours, theirs in source.columns.items() if theirs in missing)
    return (
        f"data.columns has {{{wanted}}}, but {records} of {source.entry} has {'it' if len(missing) == 1 else 'them'}; "
        f"its columns are: {', '.join(map(str, there)) or 'none'}"
    )


def _located(location: str, problems: Problems) -> Iterator[Record]:
    if is_hub_id(location):
        yield from _hub_records(location)
        return
    if _is_saved(expanded(location)):
        yield from _saved_records(expanded(location), location)
        return
    first = 0
    for path in source_files(location):
        name = location if _is_one(location) else str(path)
        if not name.endswith(RECORD_SUFFIXES):
            raise ValueError(_unknown(name))
        last = -1
        for record in read_file(path, name, problems):
            last = record.number
            yield replace(record, number=first + last) if first else record
        first += last + 1


def source_files(location: str) -> list[Path]:
    """Return the files of a location, sorted by name: all files below a folder, or those matching a glob.

    Raises:
        ValueError: there are no files, or a folder has several kinds or splits and the user must choose one.
    """
    path = expanded(location)
    if os.path.isdir(path):
        if _is_saved(path):
            return sorted(path.glob("*.arrow"))
        found = [file for file in sorted(path.rglob("*")) if _is_data(file, path)]
        _check_alike(location, found, path)
    elif _is_glob(location):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if _is_data(Path(name), path)]
    else:
        return [local_path(location)]
    if not found:
        what = "has no file that can be read" if os.path.isdir(path) else "matches no file that can be read"
        raise ValueError(f"{location} {what} ({_known()})")
    return found


def _is_one(location: str) -> bool:
    return not _is_glob(location) and not os.path.isdir(expanded(location))


def _is_glob(location: str) -> bool:
    return glob.has_magic(location) and not os.path.exists(expanded(location)) and not _HUB_FILE.fullmatch(location)


def _is_data(file: Path, root: Path) -> bool:
    """Return True for data, False for other files, such as hidden ones and Spark's ``_SUCCESS``."""
    inside = file.relative_to(root).parts if file.is_relative_to(root) else (file.name,)
    hidden = any(part.startswith((".", "_")) for part in inside)
    return not hidden and kind_of(file.name) != "" and file.name not in _DESCRIPTIONS and file.is_file()


def _check_alike(location: str, files: Sequence[Path], root: Path) -> None:
    kinds = Counter(kind_of(file.name) for file in files)
    if len(kinds) > 1:
        raise ValueError(
            f"{location} is a folder with files of several kinds ({', '.join(sorted(kinds))}); say which to read with "
            f"a glob, such as '{location}/**/*{kinds.most_common(1)[0][0]}*'"
        )
    by_split = {split: file for file in reversed(files) for split in _splits_of(file.relative_to(root))}
    if len(by_split) > 1:
        raise ValueError(
            f"{location} is a folder with several splits ({', '.join(sorted(by_split))}); name the folder of one, or a "
            f"glob of its files, such as '{location}/**/*{kind_of(files[0].name)}'; the first of each: "
            + ", ".join(str(file) for _, file in sorted(by_split.items()))
        )


def _splits_of(file: Path) -> set[str]:
    words = re.split(r"[^a-z]+", str(file).lower())
    return {_SPLITS[word] for word in words if word in _SPLITS}


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


def _known() -> str:
    return ", ".join(endings[0] for endings in KINDS.values()) + "; text also as .gz and .zst"


def _unknown(location: str) -> str:
    return (
        f"unknown kind of source: {location!r}; allowed: files ({_known()}), folders and globs of them, org/name, "
        f"org/name:file of the hub"
    )


def is_hub_id(location: str) -> bool:
    known = location.endswith(RECORD_SUFFIXES + TEXT_SUFFIXES)
    return bool(_HUB_ID.fullmatch(location)) and not known and not os.path.exists(location)


def _is_saved(path: Path) -> bool:
    """Return True for a folder written by ``Dataset.save_to_disk``."""
    try:
        return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    except (OSError, ValueError):
        return False


def _saved_records(path: Path, name: str) -> Iterator[Record]:
    import datasets

    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"cannot read the data set {name}: {str(error).strip()[:200]}") from error
    return _table_records(table, name)


def _hub_records(name: str) -> Iterator[Record]:
    yield from _table_records(_hub_table(name), name)


def hub_files(location: str) -> list[Path]:
    """Return the local files of a hub data set; none if the location is not a hub data set.

    Raises:
        ValueError: the data set can't be loaded.
    """
    table = _hub_table(location) if is_hub_id(location) else None
    return [Path(file["filename"]) for file in getattr(table, "cache_files", ())]


def _hub_table(name: str) -> Any:
    import datasets

    try:
        only_local = datasets.DownloadConfig(local_files_only=not hub_reachable())
        return datasets.load_dataset(name, split="train", download_config=only_local)
    # The hub's client raises a dozen types from several libraries; the user needs one line and a remedy.
    except Exception as error:
        raise ValueError(unreachable(name, error)) from error


def _table_records(table: Any, name: str) -> Iterator[Record]:
    for number, value in enumerate(table):
        yield Record(number, f"{name}[{number}]", without_gaps(dict(value)))


def _hub_file(name: str, file: str) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.hf_hub_download(name, file, repo_type="dataset", local_files_only=not hub_reachable())
        )
    except Exception as error:
        raise ValueError(unreachable(f"{name}:{file}", error)) from error


def unreachable(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0][:200]
    return (
        f"cannot load data set {name!r} from the hub ({type(error).__name__}: {reason}); download it once and give "
        f"the path of a local file ({_known()}) instead"
    )
