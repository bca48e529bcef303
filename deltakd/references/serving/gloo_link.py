"""Two processes joined by gloo: over TCP, from CPU memory to CPU memory."""

from __future__ import annotations

import socket
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from deltakd.references.serving.answer_layout import layout, views
from deltakd.references.serving.endpoints import UnavailableError
from deltakd.references.serving.link import MEETING_SECONDS, Meeting
from deltakd.references.serving.wire import WireError

NAME = "gloo"
#: Room beyond an answer: the next one may be longer.
_GROWTH = 1.25


@final
class GlooLink:
    """One side of the group.

    It listens, on a port of its own, at the address that this machine has on the connection, and nowhere else.

    Args:
        meeting: with the other side.
        rank: of this side.

    Raises:
        UnavailableError: the machines do not reach each other, or PyTorch has no gloo.
        OSError: the other side is gone.
    """

    def __init__(self, meeting: Meeting, rank: int) -> None:
        if not dist.is_available() or not dist.is_gloo_available():
            raise UnavailableError("this PyTorch is built without gloo")
        gloo: Any = dist.ProcessGroupGloo
        self._other = 1 - rank
        self._memory = _Memory()
        here = meeting.connection.getsockname()
        host = here[0] if meeting.connection.family != socket.AF_UNIX else "127.0.0.1"
        store = _MeetingStore(meeting)
        try:
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=host)]
            options._timeout = timedelta(seconds=MEETING_SECONDS)
            options._threads = 1
            self._group: Any = gloo(store, rank, 2, options)
        except (RuntimeError, OSError, UnavailableError) as error:
            if store.failed is not None:
                raise store.failed from None
            raise UnavailableError(
                f"the machines can't reach each other at the addresses of their connection ({_first_line(error)}); a "
                "tunnel or a port that is forwarded carries only the connection"
            ) from None

    def room(self, described: Mapping[str, tuple[torch.dtype, list[int]]]) -> dict[str, Tensor]:
        """Return memory to receive tensors in, by name; used again once all of them are gone."""
        starts, size = layout(described)
        return views(self._memory.take(size), described, starts)

    def send(self, tensors: Sequence[Tensor], seconds: float, check: Callable[[], None]) -> None:
        """Send tensors. Gloo itself notices that the other side is gone."""
        self._wait(self._begun(tensors, "send"), seconds)

    def receive(
        self, tensors: Sequence[Tensor], seconds: float, begun: Callable[[], None], check: Callable[[], None]
    ) -> None:
        """Receive tensors."""
        works = self._begun(tensors, "recv")
        begun()
        self._wait(works, seconds)

    def close(self) -> None:
        """Close the group's connections."""
        self._group = None

    def _begun(self, tensors: Sequence[Tensor], operation: str) -> list[Any]:
        group = self._group
        if group is None:
            raise WireError("the group is closed")
        found = []
        try:
            for tag, tensor in enumerate(tensors):
                if tensor.numel():
                    found.append(getattr(group, operation)([tensor.reshape(-1).view(torch.uint8)], self._other, tag))
        except RuntimeError as error:
            raise WireError(_first_line(error)) from None
        return found

    def _wait(self, works: Sequence[Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        try:
            for work in works:
                # Zero would mean: without a limit.
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        except RuntimeError as error:
            raise WireError(_first_line(error)) from None


class _MeetingStore(Store):
    """What gloo needs to find the other side, over the connection to it.

    Args:
        meeting: with the other side.
    """

    def __init__(self, meeting: Meeting) -> None:
        super().__init__()
        self._meeting = meeting
        self._own: dict[str, bytes] = {}
        #: Why the other side could not be heard; gloo would say it in its own words.
        self.failed: OSError | UnavailableError | None = None

    def set(self, key: str, value: Any) -> None:
        self._own[key] = bytes(value)
        self._meeting.tell(key, self._own[key])

    def get(self, key: str) -> bytes:
        try:
            return self._own[key] if key in self._own else self._meeting.hear(key)
        except (OSError, UnavailableError) as error:
            self.failed = error
            raise

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        for key in keys:
            self.get(key)


@final
class _Memory:
    """Memory of this process, used again and again: fresh pages cost as much as the kernel's copy."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray[Any, Any]] = deque()

    def take(self, size: int) -> Tensor:
        """Return [size] uint8, whose memory is used again once neither it nor a part of it is left."""
        kept = None
        while kept is None and self._free:
            # Too small ones are given up.
            found = self._free.popleft()
            kept = found if len(found) >= size else None
        if kept is None:
            kept = np.empty(int(size * _GROWTH) + 1, np.uint8)
        content = np.frombuffer(kept, np.uint8, size) if size else np.empty(0, np.uint8)
        weakref.finalize(content, self._free.append, kept).atexit = False
        return torch.from_numpy(content)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
