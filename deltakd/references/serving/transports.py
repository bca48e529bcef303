"""How the tensors of an answer reach the trainer: through memory that both processes see, else through the socket."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Protocol, final

import torch
from torch import Tensor

from deltakd.references.serving import cuda_ipc
from deltakd.references.serving.cuda_ipc import CudaIpcReceiver, CudaIpcSender, CudaRuntime, Pool
from deltakd.references.serving.shared_memory import SharedMemoryReceiver, SharedMemorySender, UnavailableError

#: As the config names them (``reference.transport``).
Transport = Literal["auto", "socket", "shared_memory", "cuda_ipc"]
SOCKET = "socket"


class Sender(Protocol):
    """The server's side of one connection."""

    name: str

    def place(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Hand tensors over; return what the frame's header says of them, and the tensors that the frame carries."""
        ...

    def release(self, number: int) -> None:
        """Hear from the trainer that it reads no more what was handed over."""
        ...

    def close(self) -> None:
        """The trainer has left."""
        ...


class Receiver(Protocol):
    """The trainer's side of one connection.

    Attributes:
        device: where tensors of a GPU go; those in the CPU's memory stay there.
    """

    name: str
    device: torch.device

    def take(self, placed: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what was placed, and what to tell the server. Raises WireError."""
        ...

    def close(self) -> None:
        """Let go of the server's memory."""
        ...


@final
class SocketSender:
    """Tensors travel in the frame."""

    name = SOCKET

    def place(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the tensors on the CPU, once the device has computed them."""
        return {}, {name: tensor.cpu() for name, tensor in tensors.items()}

    def release(self, number: int) -> None:
        """Nothing was kept."""

    def close(self) -> None:
        """Nothing was kept."""


@final
class Offers:
    """The ways that a server has for tensors.

    Args:
        device: of its models.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool: Pool | None = None
        if device.type == "cuda":
            with suppress(UnavailableError):
                self._pool = Pool(device, CudaRuntime())

    def make(self, asked: Collection[str]) -> dict[str, tuple[Sender, dict[str, Any]]]:
        """Return name -> the server's side of each way that a trainer asks for and the server has, and its offer."""
        found: dict[str, tuple[Sender, dict[str, Any]]] = {SOCKET: (SocketSender(), {})}
        if SharedMemorySender.name in asked:
            with suppress(UnavailableError, OSError):
                shared = SharedMemorySender()
                found[shared.name] = (shared, shared.offer())
        if cuda_ipc.NAME in asked and self._pool is not None:
            with suppress(RuntimeError):
                sender = CudaIpcSender(self._pool)
                found[sender.name] = (sender, sender.offer())
        return found


class Chosen(NamedTuple):
    """A trainer's choice.

    Args:
        name: of the transport.
        receiver: its side of it; None: the socket.
        reason: why faster ones are not possible; empty if none was tried.
    """

    name: str
    receiver: Receiver | None
    reason: str


def candidates(wanted: Transport, device: torch.device) -> list[str]:
    """Return what to ask a server for, the fastest first.

    Args:
        wanted: by the config.
        device: where the trainer wants the tensors.
    """
    if wanted != "auto":
        return [wanted]
    # On a CPU, opening a GPU would cost its memory.
    return [*([cuda_ipc.NAME] if device.type == "cuda" else []), SharedMemoryReceiver.name, SOCKET]


def choose(names: Sequence[str], offered: Mapping[str, Any]) -> Chosen:
    """Return the first transport that works.

    Args:
        names: from ``candidates``.
        offered: by the server.

    Raises:
        UnavailableError: none does.
    """
    makers = {cuda_ipc.NAME: CudaIpcReceiver, SharedMemoryReceiver.name: SharedMemoryReceiver}
    reasons: list[str] = []
    for name in names:
        if name == SOCKET:
            return Chosen(name, None, "; ".join(reasons))
        try:
            if name not in offered:
                raise UnavailableError("the server has none")
            return Chosen(name, makers[name](offered[name]), "; ".join(reasons))
        except UnavailableError as error:
            reasons.append(f"{name} is not possible: {error}")
    raise UnavailableError("; ".join(reasons))
