"""Files that are written whole or not at all, and what is said when the disk does not take them."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What only room on the disk, or another disk, can cure: full, over the user's share, over a limit, broken, read-only.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class WriteError(OSError):
    """The disk did not take something; what was there before is as it was.

    Args:
        message: what, where, why, and what is kept.
        reason: why, in a few words.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


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
        if number in _DISK:
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
    if path.is_dir():
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
def replacing(path: Path, what: str) -> Iterator[Path]:
    """Give a path beside ``path`` to write a file or a directory to; then it takes the place of ``path``.

    Whatever happens, nothing half written is left, and what was there stays until the new one is whole.

    Raises:
        WriteError: the disk did not take it.
    """
    partial = path.with_name(path.name + ".partial")
    remove(partial)
    with telling(what, path, f"the former {path.name}" if path.exists() else ""):
        try:
            yield partial
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(partial, path)
        except BaseException:
            remove(partial)
            raise
