"""Files that are functions of some arguments: written once, atomically, and recognised by their checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deltakd.io.files import write_json, write_text


def write_made_files(
    directory: Path,
    manifest: str,
    identity: Mapping[str, Any],
    names: tuple[str, ...],
    make: Callable[[], dict[str, str]],
) -> dict[str, Path]:
    """Write what ``make`` returns, unless the files with this identity already exist.

    Args:
        directory: created if missing; files there with another identity are overwritten.
        manifest: name of the JSON file with identity and checksums, written last.
        identity: what the files depend on: arguments, and the version of their format.
        names: file names.
        make: returns name -> text, for each name.

    Returns:
        File name -> path.

    Raises:
        ValueError: a file with this identity was edited since it was written.
        OSError: the directory is not writable.
    """
    paths = {name: directory / name for name in names}
    if _is_written(directory, manifest, identity, names):
        return paths
    texts = make()
    (directory / manifest).unlink(missing_ok=True)  # so that it never vouches for half-written files
    for name, path in paths.items():
        write_text(path, texts[name])
    sha256 = {name: _sha256(path) for name, path in paths.items()}
    write_json(directory / manifest, {**identity, "sha256": sha256})
    return paths


def _is_written(directory: Path, manifest: str, identity: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    if not all((directory / name).is_file() for name in (*names, manifest)):
        return False
    held = json.loads((directory / manifest).read_text(encoding="utf-8"))
    if any(held.get(key) != value for key, value in identity.items()):
        return False
    changed = [name for name in names if held["sha256"].get(name) != _sha256(directory / name)]
    if changed:
        raise ValueError(f"{', '.join(changed)} in {directory} changed since written; delete {manifest} to rewrite")
    return True


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
