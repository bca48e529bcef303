"""Answers through memory that both processes map: one copy in, none out, and nothing through the kernel's sockets.

The server makes anonymous files (``memfd_create``) and names them as ``/proc/<pid>/fd/<n>``, where processes of the
same user open them. They have no name in ``/dev/shm`` and do not count against its size: whichever side is killed, the
kernel frees them with the last process that maps them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from deltakd.references.serving.answer_layout import layout, views
from deltakd.references.serving.endpoints import Receiver, Sender, UnavailableError
from deltakd.references.serving.wire import WireError, describe, read_description

#: Regions are at least this large, so that batches of somewhat other sizes fit.
_SMALLEST = 2**20
#: Room beyond the largest answer so far: the next one may be longer.
_GROWTH = 1.25


@dataclass
class _Region:
    """Memory of the server.

    Args:
        number: unique for the connection.
        name: of the file, unknown to others.
        file: its descriptor, open as long as the region is used.
        memory: the file, mapped.
    """

    number: int
    name: str
    file: int
    memory: mmap.mmap

    @property
    def entry(self) -> dict[str, Any]:
        """Return what the trainer needs to map it; JSON."""
        place = {"pid": os.getpid(), "file": self.file, "name": self.name}
        return {"number": self.number, "size": len(self.memory), **place}


@final
class SharedMemorySender(Sender):
    """The server's side of one connection. Regions are reused once the trainer reads them no more.

    Raises:
        UnavailableError: the system has no such memory.
    """

    name = "shared_memory"

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise UnavailableError("anonymous shared memory needs Linux")
        self._changing = threading.Lock()
        self._used: dict[int, _Region] = {}
        self._free: list[_Region] = []
        self._next = 0
        self._is_closed = False
        self._free.append(self._make(_SMALLEST))

    def offer(self) -> dict[str, Any]:
        """Return a region for the trainer to try; JSON."""
        return self._free[0].entry

    def place(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Copy an answer's tensors into a region; return what the header says of it, and what is left to send.

        Raises:
            OSError: no memory is left.
        """
        listed = describe(tensors)
        starts, size = layout(read_description(listed))
        region, dropped = self._region(size)
        for name, tensor in tensors.items():
            if tensor.numel():
                room = torch.frombuffer(region.memory, dtype=tensor.dtype, count=tensor.numel(), offset=starts[name])
                room.view(tensor.shape).copy_(tensor)
        return {"placed": {"region": region.entry, "tensors": listed, "dropped": dropped}}, {}

    def release(self, number: int) -> None:
        """Use a region again: the trainer reads it no more."""
        with self._changing:
            region = self._used.pop(number, None)
            if region is None:
                return
            if self._is_closed:
                os.close(region.file)
            else:
                self._free.append(region)

    def close(self) -> None:
        """Give all regions up; those that are mapped live on until the last process lets go."""
        with self._changing:
            self._is_closed = True
            for region in [*self._free, *self._used.values()]:
                os.close(region.file)
            self._free, self._used = [], {}

    def _region(self, size: int) -> tuple[_Region, list[int]]:
        """Return a free region of at least some bytes, and the numbers of those given up for it."""
        with self._changing:
            if self._is_closed:
                raise OSError("the trainer has left")
            fitting = [region for region in self._free if len(region.memory) >= size]
            dropped = [] if fitting else self._free
            region = min(fitting, key=lambda one: len(one.memory)) if fitting else self._make(int(size * _GROWTH))
            for one in dropped:
                os.close(one.file)
            self._free = [one for one in self._free if one is not region and one not in dropped]
            self._used[region.number] = region
            return region, [one.number for one in dropped]

    def _make(self, size: int) -> _Region:
        name = f"deltakd-{secrets.token_hex(16)}"
        file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            whole = -(-max(size, _SMALLEST) // mmap.PAGESIZE) * mmap.PAGESIZE
            # Now, not when a page is first written: then, a full memory would kill the process.
            os.posix_fallocate(file, 0, whole)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _seals())
            memory = mmap.mmap(file, whole)
        except BaseException:
            os.close(file)
            raise
        self._next += 1
        return _Region(self._next, name, file, memory)


@final
class SharedMemoryReceiver(Receiver):
    """The trainer's side of one connection.

    Args:
        offer: the server's region to try.

    Raises:
        UnavailableError: the server's memory can't be opened from here.
    """

    name = "shared_memory"

    def __init__(self, offer: Any) -> None:
        self.device = torch.device("cpu")
        self._maps: dict[int, mmap.mmap] = {}
        self._released: deque[int] = deque()
        try:
            self._map(offer)
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UnavailableError(
                f"the server's memory can't be opened from here ({reason}); it runs on another machine, in another "
                "container or for another user"
            ) from None

    def take(self, placed: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return an answer's tensors, which are the server's memory, and what to tell the server.

        The region is written over once all of them are gone.

        Raises:
            WireError: the region is not there, or too small.
        """
        try:
            memory = self._map(placed["region"])
            number = placed["region"]["number"]
            described = read_description(placed["tensors"])
            starts, size = layout(described)
            if size > len(memory):
                raise ValueError("the region is too small")
            for dropped in placed["dropped"]:
                self._maps.pop(dropped, None)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise WireError(f"its shared memory can't be read ({error})") from None
        content = np.frombuffer(memory, np.uint8, size) if size else np.empty(0, np.uint8)
        # No message from here: collectors of garbage run in any thread, at any point.
        weakref.finalize(content, self._released.append, number).atexit = False
        return views(torch.from_numpy(content), described, starts), self._said()

    def _said(self) -> dict[str, Any]:
        """Return which regions nothing reads any more; they are told with the next answer."""
        freed = []
        while self._released:
            freed.append(self._released.popleft())
        return {"free": freed}

    def close(self) -> None:
        """Unmap everything."""
        self._maps = {}

    def _map(self, entry: Mapping[str, Any]) -> mmap.mmap:
        number, size = entry["number"], entry["size"]
        if number not in self._maps:
            path = f"/proc/{int(entry['pid'])}/fd/{int(entry['file'])}"
            # Another machine may have such a process, and opening what it has there could block.
            if os.readlink(path) != f"/memfd:{entry['name']} (deleted)":
                raise ValueError("another process has its number here")
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.fstat(file).st_size != size or fcntl.fcntl(file, fcntl.F_GET_SEALS) & _seals() != _seals():
                    raise ValueError("it is not what the server says it is")
                # Writable for PyTorch, which knows no other tensors; nobody writes.
                self._maps[number] = mmap.mmap(file, size)
            finally:
                os.close(file)
        return self._maps[number]


def _seals() -> int:
    """Return what fixes a file's size, so that a process that maps it can't fault; Linux alone has it."""
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
