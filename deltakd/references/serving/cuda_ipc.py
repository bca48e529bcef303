"""Answers through a GPU's memory that both processes map (CUDA IPC): hidden states never pass through the CPU's.

By the CUDA runtime's documented functions, so that handles are 64 plain bytes and nothing is pickled. Order between the
processes is kept by messages: the server says where an answer is once the device has written it, and the trainer says
that it may be written over once its own copy is done. No event is shared.

The runtime forbids freeing memory that another process has mapped, and a killed trainer can't say that it has let go.
So the server frees none: what one trainer leaves serves the next.
"""

from __future__ import annotations

import base64
import ctypes
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from deltakd.references.serving.answer_layout import layout
from deltakd.references.serving.endpoints import Receiver, Sender, UnavailableError
from deltakd.references.serving.wire import WireError, describe, read_description

NAME = "cuda_ipc"
_HANDLE_BYTES = 64
#: cudaIpcMemLazyEnablePeerAccess, the only flag that there is.
_LAZY_PEER_ACCESS = 1
#: Blocks are at least this large, and twice the largest answer so far: none is ever given back.
_SMALLEST = 2**21
#: Random bytes by which a trainer sees that it has mapped the right memory.
_PROOF_BYTES = 32


class Driver(Protocol):
    """What is needed of CUDA."""

    def allocate(self, device: torch.device, size: int) -> tuple[Tensor, bytes]:
        """Return [size] uint8 on a device, and the handle by which another process maps it. Raises RuntimeError."""
        ...

    def open(self, device: torch.device, handle: bytes, size: int) -> Tensor:
        """Map another process's memory; return [size] uint8. Raises RuntimeError."""
        ...

    def close(self, device: torch.device, mapped: Tensor) -> None:
        """Unmap it; nothing may read it any more."""
        ...

    def find(self, name: str) -> torch.device:
        """Return this process's device of a name. Raises RuntimeError if it sees none."""
        ...

    def name_of(self, device: torch.device) -> str:
        """Return a device's name, the same in all processes."""
        ...

    def waiting(self, *devices: torch.device) -> Any:
        """Return a context: what it queues on the devices is done when it ends, and waits for nothing else there."""
        ...


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t, passed by value."""

    _fields_ = (("reserved", ctypes.c_byte * _HANDLE_BYTES),)


class _Memory:
    """Memory of a device as an array, for ``torch.as_tensor``."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3}


@final
class CudaRuntime:
    """The library that PyTorch itself has loaded.

    Raises:
        UnavailableError: there is no CUDA.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available() or torch.version.cuda is None:
            raise UnavailableError("there is no CUDA device")
        try:
            self._library = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")
        except OSError as error:
            raise UnavailableError(str(error)) from None
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._library.cudaIpcOpenMemHandle.argtypes = (ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint)

    def allocate(self, device: torch.device, size: int) -> tuple[Tensor, bytes]:
        """As for ``Driver``."""
        # Not PyTorch's allocator: its blocks are parts of larger ones, which another process would map as a whole.
        pointer, handle = ctypes.c_void_p(), _Handle()
        with torch.cuda.device(device):
            self._check(self._library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)))
            self._check(self._library.cudaIpcGetMemHandle(ctypes.byref(handle), pointer))
            return torch.as_tensor(_Memory(pointer.value or 0, size), device=device), bytes(handle)

    def open(self, device: torch.device, handle: bytes, size: int) -> Tensor:
        """As for ``Driver``."""
        pointer, given = ctypes.c_void_p(), _Handle.from_buffer_copy(handle)
        with torch.cuda.device(device):
            self._check(self._library.cudaIpcOpenMemHandle(ctypes.byref(pointer), given, _LAZY_PEER_ACCESS))
            return torch.as_tensor(_Memory(pointer.value or 0, size), device=device)

    def close(self, device: torch.device, mapped: Tensor) -> None:
        """As for ``Driver``."""
        with torch.cuda.device(device):
            self._library.cudaIpcCloseMemHandle(ctypes.c_void_p(mapped.data_ptr()))

    def find(self, name: str) -> torch.device:
        """As for ``Driver``."""
        devices = (torch.device("cuda", number) for number in range(torch.cuda.device_count()))
        found = next((device for device in devices if self.name_of(device) == name), None)
        if found is None:
            raise RuntimeError("the server's GPU is not among those of this process (CUDA_VISIBLE_DEVICES)")
        return found

    def name_of(self, device: torch.device) -> str:
        """As for ``Driver``."""
        return str(torch.cuda.get_device_properties(device).uuid)

    @contextmanager
    def waiting(self, *devices: torch.device) -> Iterator[None]:
        """As for ``Driver``."""
        streams = [torch.cuda.Stream(device) for device in devices]
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            yield
            for stream in streams:
                stream.synchronize()

    def _check(self, status: int) -> None:
        if status:
            # Otherwise PyTorch would find it and take it for its own.
            self._library.cudaGetLastError()
            raise RuntimeError(self._library.cudaGetErrorString(status).decode())


@dataclass
class Block:
    """Memory of the server's device.

    Args:
        number: unique in the process.
        content: [size] uint8.
        handle: by which another process maps it.
    """

    number: int
    content: Tensor
    handle: bytes


@final
class Pool:
    """All blocks of a device that a process has shared; a server has one.

    Args:
        device: of the models.
        driver: CUDA.
    """

    def __init__(self, device: torch.device, driver: Driver) -> None:
        self.device = device
        self.driver = driver
        self._changing = threading.Lock()
        self._free: list[Block] = []
        self._made = 0

    def take(self, size: int) -> Block:
        """Return a block of at least some bytes. Raises RuntimeError if the device has no memory left."""
        with self._changing:
            fitting = [block for block in self._free if len(block.content) >= size]
            if fitting:
                block = min(fitting, key=lambda one: len(one.content))
                self._free.remove(block)
                return block
            self._made += 1
            return Block(self._made, *self.driver.allocate(self.device, max(_SMALLEST, 2 * size)))

    def give(self, block: Block) -> None:
        """Let others have a block."""
        with self._changing:
            self._free.append(block)


@final
class CudaIpcSender(Sender):
    """The server's side of one connection.

    Args:
        pool: of the server.
    """

    name = NAME

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._changing = threading.Lock()
        self._used: dict[int, Block] = {}
        self._offered: int | None = None
        self._is_closed = False

    def offer(self) -> dict[str, Any]:
        """Return a block with known content for the trainer to try; JSON. Raises RuntimeError if there is no memory."""
        block, proof = self._pool.take(_PROOF_BYTES), secrets.token_bytes(_PROOF_BYTES)
        with self._pool.driver.waiting(self._pool.device):
            block.content[:_PROOF_BYTES].copy_(torch.frombuffer(bytearray(proof), dtype=torch.uint8))
        self._use(block)
        self._offered = block.number
        return {**self._entry(block), "proof": base64.b64encode(proof).decode()}

    def place(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Copy an answer's tensors into a block; return what the header says of it, and what is left to send.

        Raises:
            RuntimeError: the device has no memory left.
            OSError: the trainer has left.
        """
        listed = describe(tensors)
        starts, size = layout(read_description(listed))
        if self._offered is not None:
            # It asks, so it has tried the block.
            self.release(self._offered)
            self._offered = None
        block = self._pool.take(size)
        self._use(block)
        # On the models' stream: first they are computed.
        for name, tensor in tensors.items():
            room = block.content[starts[name] : starts[name] + tensor.nbytes]
            room.copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        if self._pool.device.type == "cuda":
            torch.cuda.current_stream(self._pool.device).synchronize()
        return {"placed": {"region": self._entry(block), "tensors": listed}}, {}

    def release(self, number: int) -> None:
        """Use a block again: the trainer has copied what was in it."""
        with self._changing:
            block = self._used.pop(number, None)
        if block is not None:
            self._pool.give(block)

    def close(self) -> None:
        """Leave all blocks to other trainers."""
        with self._changing:
            self._is_closed = True
        for number in list(self._used):
            self.release(number)

    def _use(self, block: Block) -> None:
        with self._changing:
            if not self._is_closed:
                self._used[block.number] = block
                return
        self._pool.give(block)
        raise OSError("the trainer has left")

    def _entry(self, block: Block) -> dict[str, Any]:
        handle = base64.b64encode(block.handle).decode()
        device = self._pool.driver.name_of(self._pool.device)
        return {"number": block.number, "size": len(block.content), "handle": handle, "device": device}


@final
class CudaIpcReceiver(Receiver):
    """The trainer's side of one connection.

    Args:
        offer: the server's block to try.
        driver: CUDA; None: PyTorch's.

    Raises:
        UnavailableError: the server's memory can't be mapped here.
    """

    name = NAME

    def __init__(self, offer: Any, driver: Driver | None = None) -> None:
        self._mapped: dict[int, Tensor] = {}
        #: Where answers go (``ServedReferences.to``).
        self.device = torch.device("cpu")
        try:
            self._driver: Driver = CudaRuntime() if driver is None else driver
            self._there = self._driver.find(str(offer["device"]))
            proof = base64.b64decode(offer["proof"])
            with self._driver.waiting(self._there):
                found = self._map(offer)[: len(proof)].cpu()
            if bytes(found.numpy()) != proof:
                raise RuntimeError("it does not hold what the server says")
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            self.close()
            raise UnavailableError(f"the server's GPU memory can't be mapped here ({error})") from None

    def take(self, placed: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return copies of an answer's tensors on ``device``, and what to tell the server.

        Raises:
            WireError: the block can't be read.
        """
        try:
            block = self._map(placed["region"])
            described = read_description(placed["tensors"])
            starts, size = layout(described)
            if size > len(block):
                raise ValueError("the block is too small")
            devices = {self._there, self.device} if self.device.type == "cuda" else {self._there}
            tensors = {}
            with self._driver.waiting(*devices):
                for name, (dtype, shape) in described.items():
                    tensors[name] = torch.empty(shape, dtype=dtype, device=self.device)
                    room = tensors[name].reshape(-1).view(torch.uint8)
                    room.copy_(block[starts[name] : starts[name] + room.numel()], non_blocking=True)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise WireError(f"its GPU memory can't be read ({error})") from None
        return tensors, {"free": [placed["region"]["number"]]}

    def close(self) -> None:
        """Unmap everything."""
        mapped, self._mapped = self._mapped, {}
        for block in mapped.values():
            self._driver.close(self._there, block)

    def _map(self, entry: Mapping[str, Any]) -> Tensor:
        number, size = entry["number"], entry["size"]
        if number not in self._mapped:
            handle = base64.b64decode(entry["handle"])
            if len(handle) != _HANDLE_BYTES or type(size) is not int or size < 1:
                raise ValueError("it is not a handle")
            self._mapped[number] = self._driver.open(self._there, handle, size)
        return self._mapped[number]
