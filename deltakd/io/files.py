"""The single place that writes files and directories: all or nothing, with a clear message if the disk fails.

Content is written to a partial file next to its target, flushed to disk (fsync), and renamed. Readers see the old
content or the new, and a killed process leaves nothing half-written under a final name. Processes that write the same
file do not collide: each has its own partial file. The next write removes what killed processes left behind.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

#: Errors that need space or another disk: disk full, over quota, file too large, I/O error.
_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
#: Errors that need permission or another place: no access, not permitted, read-only.
_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
#: Suffix of names whose content is still being written; such files count as absent.
PARTIAL = ".partial"
#: Seconds after which another machine's partial file counts as a leftover, since its process can't be checked.
_ABANDONED = 7 * 24 * 3600.0
_written = itertools.count()


class WriteError(OSError):
    """The disk failed; the previous content is unchanged.

    Args:
        message: what, where, why, and what is kept.
        reason: why, in a few words.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def is_full(self) -> bool:
        """True if the disk is full or the user's quota is used up."""
        return self.reason in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def way_out(reason: str, how_to_resume: str) -> str:
    """Return the remedy after a disk failure, as a sentence.

    Args:
        reason: the result of ``disk_reason``.
        how_to_resume: how a user continues.
    """
    if reason in map(os.strerror, _PERMISSION):
        return f"Get access to it, then: {how_to_resume}; or give another place"
    return f"Make room, then: {how_to_resume}"


def disk_reason(error: BaseException) -> str | None:
    """Return why the disk failed, in a few words; None if the error has another cause.

    torch and safetensors replace the system's errors with their own, and sharded checkpoints wrap all ranks' errors in
    one.
    """
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        found = waiting.pop(0)
        if found in seen:
            continue
        seen.append(found)
        if isinstance(found, WriteError):
            return found.reason
        number = found.errno if isinstance(found, OSError) else None
        quoted = re.search(r"\(os error (\d+)\)", str(found)) if type(found).__name__ == "SafetensorError" else None
        number = int(quoted[1]) if quoted else number
        if number in (*_ROOM, *_PERMISSION):
            return os.strerror(number)
        failures = getattr(found, "failures", None)
        of_ranks = [wrapped[0] for wrapped in failures.values()] if isinstance(failures, dict) else []
        waiting += [e for e in (found.__cause__, found.__context__, *of_ranks) if e is not None]
    # torch.save reports a short write without the system's error.
    torch_says = [str(e) for e in seen if isinstance(e, RuntimeError)]
    short = any(word in said for said in torch_says for word in ("PytorchStreamWriter", "inline_container"))
    return "only a part of it could be written" if short else None


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def telling(what: str, path: Path, kept: str = "") -> Iterator[None]:
    """Turn disk errors into a ``WriteError`` that says what could not be written, and why.

    Args:
        what: what is being written.
        path: where.
        kept: what stays unchanged.

    Raises:
        WriteError: the disk failed.
    """
    try:
        yield
    except BaseException as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        ending = f"; {kept} is kept" if kept else ""
        raise WriteError(f"{what} could not be written to {path}: {reason}{ending}", reason) from error


@contextmanager
def replacing(path: Path, what: str = "", *, first_wins: bool = False) -> Iterator[Path]:
    """Yield a path next to ``path`` for a new file or directory, then move it to ``path``.

    Nothing half-written is ever left, and the old content stays until the new is complete and on disk.

    Args:
        path: the target; missing parents are created.
        what: a description for the message; its name by default.
        first_wins: keep content that another process put there in the meantime, if all processes write the same.

    Raises:
        WriteError: the disk failed.
    """
    kept = f"the former {path.name}" if path.exists() else ""
    with telling(what or path.name, path, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        partial = path_beside(path)
        # A restarted container has the same process ids as the killed one.
        remove(partial)
        try:
            yield partial
            _to_disk(partial)
            _put(partial, path, first_wins)
            _sync_folder(path.parent)
        finally:
            remove(partial)


def make_folder(path: Path, what: str) -> None:
    """Create a folder and its missing parents.

    Args:
        path: the folder.
        what: it is for, for the message.

    Raises:
        WriteError: the disk failed.
    """
    with telling(what, path):
        path.mkdir(parents=True, exist_ok=True)


def write_bytes(path: str | Path, content: bytes, what: str = "") -> None:
    """Write a file.

    Raises:
        WriteError: the disk failed.
    """
    with replacing(Path(path), what) as partial:
        partial.write_bytes(content)


def write_text(path: str | Path, text: str, what: str = "") -> None:
    """Write a text file in UTF-8, with line ends unchanged.

    Raises:
        WriteError: the disk failed.
    """
    write_bytes(path, text.encode("utf-8"), what)


def write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as JSON with a final newline.

    Raises:
        WriteError: the disk failed.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_json_lines(path: str | Path, records: Iterable[dict[str, Any]], what: str = "") -> None:
    """Write records, one JSON object per line.

    Raises:
        WriteError: the disk failed.
    """
    with (
        replacing(Path(path), what) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_json_lines(path: str | Path) -> list[dict[str, Any]] | None:
    """Return the records written by ``write_json_lines``; None if there is no file.

    Raises:
        ValueError: a line is not JSON; the message names file and line.
    """
    path = Path(path)
    if not path.exists():
        return None
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}, is not JSON ({error}): delete the file to have it generated again."
                ) from error
    return records


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def path_beside(path: Path, process: int | None = None) -> Path:
    """Return a path in the same folder that no other writer uses.

    A rename is atomic only within a file system. The name holds the writer's machine and process, so that leftovers of
    killed processes can be told from files in progress.

    Args:
        path: where the content will go.
        process: id of the writer; None: this process.
    """
    writer = os.getpid() if process is None else process
    return path.with_name(f"{path.name}.{_machine()}-{writer}-{next(_written)}{PARTIAL}")


def _remove_leftovers(path: Path) -> None:
    """Remove the partial files of processes that are gone."""
    name = re.compile(re.escape(path.name) + r"\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-\d+" + re.escape(PARTIAL))
    for other in path.parent.iterdir():
        found = name.fullmatch(other.name)
        if found is None:
            continue
        with suppress(FileNotFoundError):
            here = found["machine"] == _machine()
            if not _is_running(int(found["process"])) if here else time.time() - other.stat().st_mtime > _ABANDONED:
                remove(other)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _put(partial: Path, path: Path, first_wins: bool) -> None:
    """Rename. A rename can't replace a directory that is not empty, so the old one moves aside first."""
    former = path_beside(path)
    while not (first_wins and path.exists()):
        if path.is_dir():
            with suppress(FileNotFoundError):
                os.replace(path, former)
        try:
            os.replace(partial, path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if former.exists():
                    os.replace(former, path)
                raise
            # Another process has put its directory there meanwhile.
            remove(former)
    remove(former)


def _to_disk(path: Path) -> None:
    for file in [path, *path.rglob("*")]:
        if file.is_dir():
            _sync_folder(file)
        else:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Flush the folder's entries to disk; ignore network file systems that can't."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def read_by_step(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Return optimiser step -> records of ``step_<N>.jsonl``, in the order of the steps; empty without a folder.

    Raises:
        ValueError: a file is damaged.
    """
    paths = sorted(folder.glob("step_*.jsonl"))
    return {int(path.stem.removeprefix("step_")): read_json_lines(path) or [] for path in paths}
