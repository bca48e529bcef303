"""Flat arrays in a folder: written piece by piece, read as memory maps, which all processes of a machine share."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deltakd.io.files import replacing, telling, write_json
from deltakd.io.home import expanded

#: Lists the arrays; written last.
_INDEX = "arrays.json"


class Arrays(NamedTuple):
    """Arrays of a folder, read-only.

    Args:
        arrays: name -> flat array, mapped from its file.
        meta: the metadata written with them.
    """

    arrays: dict[str, NDArray[Any]]
    meta: dict[str, Any]


@final
class ArrayWriter:
    """Writes the arrays of a folder.

    Args:
        folder: a new folder.
        dtypes: name -> type of each array, little-endian.
    """

    def __init__(self, folder: Path, dtypes: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in dtypes}
        #: Metadata to write with the arrays; must be JSON.
        self.meta: dict[str, Any] = {}

    def append(self, name: str, values: ArrayLike) -> None:
        """Append values to an array."""
        self._files[name].write(np.ascontiguousarray(values, self._dtypes[name]).data)

    def append_bytes(self, name: str, values: bytes) -> None:
        """Append bytes to an array of bytes."""
        self._files[name].write(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files.values():
            file.close()
        if kind is not None:
            return
        sizes = {name: (self._folder / name).stat().st_size // self._dtypes[name].itemsize for name in self._files}
        index = {name: {"dtype": self._dtypes[name].str, "size": sizes[name]} for name in self._files}
        write_json(self._folder / _INDEX, {"arrays": index, "meta": self.meta})


def kept_arrays(
    name: str,
    cache_dir: str | Path | None,
    dtypes: Mapping[str, str],
    build: Callable[[ArrayWriter], None],
    what: str = "the prepared data",
) -> Arrays:
    """Open the arrays of a name, or build and keep them.

    A folder gets its final name only when it is complete, so interrupted and concurrent processes do no harm.

    Args:
        name: of the folder; identifies everything that the arrays depend on.
        cache_dir: where the folder is, created if missing. None: the files are temporary, and are deleted when the
            process ends.
        dtypes: as for ``ArrayWriter``.
        build: writes the arrays.
        what: a name for the arrays, for messages.

    Raises:
        ValueError: a file has changed since it was written.
        WriteError: the disk failed.
    """
    if cache_dir is None:
        return _temporary(dtypes, build, what)
    final = expanded(cache_dir) / name
    if not final.is_dir():
        with replacing(final, what, first_wins=True) as partial, ArrayWriter(partial, dtypes) as writer:
            build(writer)
    return open_arrays(final)


def _temporary(dtypes: Mapping[str, str], build: Callable[[ArrayWriter], None], what: str) -> Arrays:
    # Maps outlive the names of their files.
    with tempfile.TemporaryDirectory(prefix="deltakd-", ignore_cleanup_errors=True) as folder:
        with telling(what, Path(folder)), ArrayWriter(Path(folder), dtypes) as writer:
            build(writer)
        return open_arrays(Path(folder))


def open_arrays(folder: Path) -> Arrays:
    """Map the arrays written by an ``ArrayWriter``.

    Raises:
        ValueError: a file is missing or has the wrong size, or the list of files can't be read.
    """
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        arrays = {name: _mapped(folder / name, **entry) for name, entry in index["arrays"].items()}
        return Arrays(arrays, index["meta"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, OSError | _SizeError) else f"{folder / _INDEX} can't be read"
        raise ValueError(f"{reason}; it is not as it was written: delete {folder} to have it made again") from error


class _SizeError(ValueError):
    """A file whose size has changed since it was written."""


def _mapped(path: Path, dtype: str, size: int) -> NDArray[Any]:
    kind = np.dtype(dtype)
    found = path.stat().st_size
    if found != size * kind.itemsize:
        raise _SizeError(f"{path} has {found} bytes, not {size * kind.itemsize}")
    # An empty file can't be mapped. A plain view is faster to slice than numpy's memmap class.
    return np.memmap(path, kind, mode="r").view(np.ndarray) if size else np.empty(0, kind)
