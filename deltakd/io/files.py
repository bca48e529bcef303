"""The one way to write a file or a directory: whole or not at all, and said plainly where the disk does not take it.

Everything is written beside its place, brought to the disk (fsync), and renamed. So a reader sees the former content or
the new one, a killed process leaves nothing half written under a name that counts, and processes that write the same
file do not meet: each has a partial file of its own. What killed processes left behind goes with the next write.
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

#: What only room on the disk, or another disk, can cure: full, over the user's share, over a limit, broken.
_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
#: What only permission, or another place, can cure.
_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
#: How a name ends while its content is being written; such files count as not there.
PARTIAL = ".partial"
#: Seconds after which a partial file of another machine is taken for a leftover: its process can't be asked.
_ABANDONED = 7 * 24 * 3600.0
_written = itertools.count()


class WriteError(OSError):
    """The disk did not take something; what was there before is as it was.

    Args:
        message: what, where, why, and what is kept.
        reason: why, in a few words.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def is_full(self) -> bool:
        """True if there is no room left, on the disk or in the user's share of it."""
        return self.reason in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def way_out(reason: str, how_to_resume: str) -> str:
    """Return what to do where the disk did not take something, as a sentence.

    Args:
        reason: what ``disk_reason`` said.
        how_to_resume: what a user does to go on.
    """
    if reason in map(os.strerror, _PERMISSION):
        return f"Get access to it, then: {how_to_resume}; or give another place"
    return f"Make room, then: {how_to_resume}"


def disk_reason(error: BaseException) -> str | None:
    """Why the disk did not take it, in a few words; None where the error is none of the disk's.

    torch and safetensors put errors of their own in the place of the system's, and sharded checkpoints gather those
    of all ranks in one.
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
    # What torch.save makes of a short write, with nothing of the system's error in it.
    torch_says = [str(e) for e in seen if isinstance(e, RuntimeError)]
    short = any(word in said for said in torch_says for word in ("PytorchStreamWriter", "inline_container"))
    return "only a part of it could be written" if short else None


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def telling(what: str, path: Path, kept: str = "") -> Iterator[None]:
    """Say what could not be written, and why, where the disk is the reason.

    Args:
        what: that is being written.
        path: where.
        kept: what stays as it was.

    Raises:
        WriteError: the disk did not take it.
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
    """Give a path beside ``path`` to write a file or a directory to; then it takes the place of ``path``.

    Whatever happens, nothing half written is left, and what was there stays until the new one is whole and on the disk.

    Args:
        path: where it belongs; missing parents are made.
        what: what it is, for the message; its name by default.
        first_wins: what another process put there in the meantime stays: for what all of them would write alike.

    Raises:
        WriteError: the disk did not take it.
    """
    kept = f"the former {path.name}" if path.exists() else ""
    with telling(what or path.name, path, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        partial = path_beside(path)
        # A container that starts again has the process ids of the one that was killed.
        remove(partial)
        try:
            yield partial
            _to_disk(partial)
            _put(partial, path, first_wins)
            _sync_folder(path.parent)
        finally:
            remove(partial)


def make_folder(path: Path, what: str) -> None:
    """Make a folder and its parents, as far as they are not there.

    Args:
        path: the folder.
        what: it is for, for the message.

    Raises:
        WriteError: the disk did not take it.
    """
    with telling(what, path):
        path.mkdir(parents=True, exist_ok=True)


def write_bytes(path: str | Path, content: bytes, what: str = "") -> None:
    """Write a file.

    Raises:
        WriteError: the disk did not take it.
    """
    with replacing(Path(path), what) as partial:
        partial.write_bytes(content)


def write_text(path: str | Path, text: str, what: str = "") -> None:
    """Write a text file: UTF-8, its line ends as they are.

    Raises:
        WriteError: the disk did not take it.
    """
    write_bytes(path, text.encode("utf-8"), what)


def write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as JSON, with a line end.

    Raises:
        WriteError: the disk did not take it.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_json_lines(path: str | Path, records: Iterable[dict[str, Any]], what: str = "") -> None:
    """Write records, one JSON object a line.

    Raises:
        WriteError: the disk did not take them.
    """
    with (
        replacing(Path(path), what) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_json_lines(path: str | Path) -> list[dict[str, Any]] | None:
    """Return the records of a file that ``write_json_lines`` wrote, or None where there is no file.

    Raises:
        ValueError: naming the file and the line that is not JSON.
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

    A rename is atomic only within a file system. The name says which process of which machine writes there, so that
    what it leaves behind when it is killed can be told from what is being written.

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
    """Rename; a directory does not take the place of another by a rename, so that one goes aside first."""
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
            # Another process has put its directory there since.
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
    """Bring the new name to the disk; some network file systems can't, and need not be asked."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
