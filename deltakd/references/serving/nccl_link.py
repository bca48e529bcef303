"""Two processes joined by NCCL: from GPU memory to GPU memory, over InfiniBand, RoCE, TCP or NVLink.

By the documented functions of the library that PyTorch has loaded, as vLLM and TRL do, and not by a
``ProcessGroupNCCL``: that takes the process down when the other side dies, and the first one made in a process passes
for its default group, which here would be made before DDP's or FSDP's.

The communicator is non-blocking: each call returns at once, and is polled until it is done, the time is up, the other
side is gone or NCCL reports an error. The thread that polls then aborts it, so no two threads ever call NCCL for one
communicator.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor

from deltakd.references.serving.endpoints import UnavailableError
from deltakd.references.serving.link import MEETING_SECONDS, SERVER, Meeting
from deltakd.references.serving.wire import WireError

NAME = "nccl"
_ID_BYTES = 128
_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_CONFIG_MAGIC = 0xCAFEBEEF
#: The first version with non-blocking communicators; newer ones read its shorter config, too.
_CONFIG_VERSION = 21400
#: Seconds between polls: the shortest, at first, and the longest.
_SHORTEST, _LONGEST = 50e-6, 2e-3


class Driver(Protocol):
    """What is needed of NCCL and CUDA, on one device. All raise RuntimeError."""

    version: str

    def new_id(self) -> bytes:
        """Return what the two sides of a new group find each other by."""
        ...

    def join(self, identity: bytes, rank: int) -> Any:
        """Begin to join a group of two; return the communicator."""
        ...

    def move(self, communicator: Any, operation: str, tensors: Sequence[Tensor], other: int) -> None:
        """Begin to ``send`` or ``recv`` tensors, one after the other."""
        ...

    def is_settled(self, communicator: Any) -> bool:
        """Return True if what was begun is on the device's queue. Raises RuntimeError if it failed, or later failed."""
        ...

    def mark(self) -> Callable[[], bool]:
        """Return a function that says if the device has done all that is on its queue now."""
        ...

    def abort(self, communicator: Any) -> None:
        """End a communicator, and what it is doing."""
        ...

    def room(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """Return memory that the queue may write to at once."""
        ...


@final
class NcclLink:
    """One side of the group.

    Args:
        meeting: with the other side.
        rank: of this side.
        driver: of the device that tensors are sent from or received on.

    Raises:
        UnavailableError: NCCL can't join the two.
        OSError: the other side is gone.
    """

    def __init__(self, meeting: Meeting, rank: int, driver: Driver) -> None:
        self._driver = driver
        self._other = 1 - rank
        self._communicator: Any = None
        identity = b""
        if rank != SERVER:
            identity = meeting.hear("id")
            if len(identity) != _ID_BYTES:
                raise WireError("it names no group of NCCL")
        try:
            if rank == SERVER:
                identity = driver.new_id()
                meeting.tell("id", identity)
            self._communicator = driver.join(identity, rank)
            self._poll(lambda: driver.is_settled(self._communicator), MEETING_SECONDS, lambda: None)
        except (RuntimeError, WireError) as error:
            self.close()
            raise UnavailableError(
                f"NCCL {driver.version} can't join server and run ({error}); both machines must reach each other "
                "directly (NCCL_SOCKET_IFNAME names the interface, NCCL_DEBUG=INFO says more)"
            ) from None

    def room(self, described: Mapping[str, tuple[torch.dtype, list[int]]]) -> dict[str, Tensor]:
        """Return memory to receive tensors in, by name."""
        return {name: self._driver.room(dtype, shape) for name, (dtype, shape) in described.items()}

    def send(self, tensors: Sequence[Tensor], seconds: float, check: Callable[[], None]) -> None:
        """Send tensors."""
        self._move("send", tensors, seconds, lambda: None, check)

    def receive(
        self, tensors: Sequence[Tensor], seconds: float, begun: Callable[[], None], check: Callable[[], None]
    ) -> None:
        """Receive tensors."""
        self._move("recv", tensors, seconds, begun, check)

    def close(self) -> None:
        """Leave the group. Not by ``ncclCommDestroy``, which waits for the other side."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            self._driver.abort(communicator)

    def _move(
        self,
        operation: str,
        tensors: Sequence[Tensor],
        seconds: float,
        begun: Callable[[], None],
        check: Callable[[], None],
    ) -> None:
        driver, communicator = self._driver, self._communicator
        if communicator is None:
            raise WireError("the group is closed")
        filled = [tensor for tensor in tensors if tensor.numel()]
        deadline = time.monotonic() + seconds
        try:
            if filled:
                driver.move(communicator, operation, filled, self._other)
            begun()
            if filled:
                # The first transfer connects the two, so it only settles once both have begun.
                self._poll(lambda: driver.is_settled(communicator), seconds, check)
                is_done = driver.mark()
                self._poll(lambda: driver.is_settled(communicator) and is_done(), deadline - time.monotonic(), check)
        except (RuntimeError, OSError) as error:
            # Else a kernel would wait on the device for the other side.
            self.close()
            raise error if isinstance(error, OSError) else WireError(f"NCCL: {error}") from None

    def _poll(self, is_done: Callable[[], bool], seconds: float, check: Callable[[], None]) -> None:
        """Wait until something is done. Raises WireError after some seconds."""
        deadline, pause = time.monotonic() + seconds, _SHORTEST
        while not is_done():
            check()
            if time.monotonic() > deadline:
                raise WireError(f"it did not finish within {seconds:.0f} seconds")
            time.sleep(pause)
            pause = min(_LONGEST, 1.2 * pause)


class _Id(ctypes.Structure):
    """ncclUniqueId, passed by value."""

    _fields_ = (("internal", ctypes.c_byte * _ID_BYTES),)


class _Config(ctypes.Structure):
    """ncclConfig_t of NCCL 2.14."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )


@final
class NcclDriver:
    """The library that PyTorch itself has loaded.

    Args:
        device: a CUDA device.

    Raises:
        UnavailableError: there is no CUDA, or no NCCL.
    """

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available() or torch.version.cuda is None:
            raise UnavailableError("there is no CUDA device")
        try:
            self._library = ctypes.CDLL("libnccl.so.2")
            self._declare()
        except (OSError, AttributeError) as error:
            raise UnavailableError(f"there is no NCCL that can do this: {error}") from None
        number = ctypes.c_int()
        self._library.ncclGetVersion(ctypes.byref(number))
        self.version = f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        # Of high priority, so that it shares no queue of the GPU with the models' work, which may wait for other ranks.
        self._stream = torch.cuda.Stream(self._device, priority=-1)

    def new_id(self) -> bytes:
        """As for ``Driver``."""
        identity = _Id()
        with torch.cuda.device(self._device):
            self._check(self._library.ncclGetUniqueId(ctypes.byref(identity)))
        return bytes(identity)

    def join(self, identity: bytes, rank: int) -> ctypes.c_void_p:
        """As for ``Driver``."""
        communicator = ctypes.c_void_p()
        config = _Config(ctypes.sizeof(_Config), _CONFIG_MAGIC, _CONFIG_VERSION, 0)
        with torch.cuda.device(self._device):
            self._check(
                self._library.ncclCommInitRankConfig(
                    ctypes.byref(communicator), 2, _Id.from_buffer_copy(identity), rank, ctypes.byref(config)
                )
            )
        return communicator

    def move(self, communicator: ctypes.c_void_p, operation: str, tensors: Sequence[Tensor], other: int) -> None:
        """As for ``Driver``."""
        function = self._library.ncclSend if operation == "send" else self._library.ncclRecv
        stream = ctypes.c_void_p(self._stream.cuda_stream)
        with torch.cuda.device(self._device):
            # As one group: otherwise each call would have to settle before the next one.
            self._check(self._library.ncclGroupStart())
            try:
                for tensor in tensors:
                    self._check(function(tensor.data_ptr(), tensor.nbytes, _UINT8, other, communicator, stream))
            finally:
                ended = self._library.ncclGroupEnd()
            self._check(ended)

    def is_settled(self, communicator: ctypes.c_void_p) -> bool:
        """As for ``Driver``."""
        state = ctypes.c_int()
        self._check(self._library.ncclCommGetAsyncError(communicator, ctypes.byref(state)))
        self._check(state.value)
        return state.value == _SUCCESS

    def mark(self) -> Callable[[], bool]:
        """As for ``Driver``."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event.query

    def abort(self, communicator: ctypes.c_void_p) -> None:
        """As for ``Driver``."""
        with torch.cuda.device(self._device):
            self._library.ncclCommAbort(communicator)

    def room(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """As for ``Driver``."""
        # Made on this stream, so memory that another stream still reads is not given out (``record_stream``).
        with torch.cuda.stream(self._stream):
            return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def _check(self, status: int) -> None:
        if status not in (_SUCCESS, _IN_PROGRESS):
            raise RuntimeError(self._library.ncclGetErrorString(status).decode())

    def _declare(self) -> None:
        """Say what the functions take, since ctypes would cut pointers to 32 bits."""
        library, pointer, number = self._library, ctypes.c_void_p, ctypes.c_int
        library.ncclGetErrorString.restype = ctypes.c_char_p
        library.ncclGetErrorString.argtypes = (number,)
        library.ncclGetVersion.argtypes = (ctypes.POINTER(number),)
        library.ncclGetUniqueId.argtypes = (ctypes.POINTER(_Id),)
        library.ncclCommInitRankConfig.argtypes = (
            ctypes.POINTER(pointer),
            number,
            _Id,
            number,
            ctypes.POINTER(_Config),
        )
        library.ncclCommGetAsyncError.argtypes = (pointer, ctypes.POINTER(number))
        library.ncclCommAbort.argtypes = (pointer,)
        for function in (library.ncclSend, library.ncclRecv):
            function.argtypes = (pointer, ctypes.c_size_t, number, number, pointer, pointer)


def gpu_of(device: torch.device) -> str:
    """Return a GPU's name, the same in all processes of its machine and on no other machine."""
    return str(torch.cuda.get_device_properties(device).uuid)
