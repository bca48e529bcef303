"""How the tensors of an answer reach the trainer: through memory that both processes see, else through the socket."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Protocol, final

from torch import Tensor

from deltakd.references.serving.shared_memory import SharedMemoryReceiver, SharedMemorySender, UnavailableError

#: As the config names them (``reference.transport``).
Transport = Literal["auto", "socket", "shared_memory"]
SOCKET = "socket"


class Sender(Protocol):
    """The server's side of one connection."""

    name: str

    def place(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Hand tensors over; return what the frame's header says of them, and the tensors that the frame carries."""
        ...

    def release(self, number: Any) -> None:
        """Hear from the trainer that it has copied what was handed over."""
        ...

    def close(self) -> None:
        """The trainer has left."""
        ...


class Receiver(Protocol):
    """The trainer's side of one connection."""

    name: str

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

    def release(self, number: Any) -> None:
        """Nothing was kept."""

    def close(self) -> None:
        """Nothing was kept."""


def offers(asked: Collection[str]) -> dict[str, tuple[Sender, dict[str, Any]]]:
    """Return name -> the server's side of each transport that a trainer asks for and the server has, and its offer."""
    found: dict[str, tuple[Sender, dict[str, Any]]] = {SOCKET: (SocketSender(), {})}
    if SharedMemorySender.name in asked:
        with suppress(UnavailableError, OSError):
            shared = SharedMemorySender()
            found[shared.name] = (shared, shared.offer())
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


def candidates(wanted: Transport) -> list[str]:
    """Return what to ask a server for, the fastest first."""
    return [SharedMemoryReceiver.name, SOCKET] if wanted == "auto" else [wanted]


def choose(names: Sequence[str], offered: Mapping[str, Any]) -> Chosen:
    """Return the first transport that works.

    Args:
        names: from ``candidates``.
        offered: by the server.

    Raises:
        UnavailableError: none does.
    """
    reasons: list[str] = []
    for name in names:
        if name == SOCKET:
            return Chosen(name, None, "; ".join(reasons))
        try:
            if name not in offered:
                raise UnavailableError("the server has none")
            return Chosen(name, SharedMemoryReceiver(offered[name]), "; ".join(reasons))
        except UnavailableError as error:
            reasons.append(f"{name} is not possible: {error}")
    raise UnavailableError("; ".join(reasons))
