"""The two sides of a way for the tensors of answers: for each connection one object here and one there."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltakd.references.serving.wire import send

#: Sends the other side a header; JSON.
Say = Callable[[Mapping[str, Any]], None]


class UnavailableError(Exception):
    """This way for tensors does not work between the two processes."""


class Sender(ABC):
    """The server's side of one connection.

    Attributes:
        name: of the transport.
    """

    name: str

    def meet(self, connection: socket.socket) -> None:  # noqa: B027 - most ways have nothing to agree on
        """Agree with the trainer, which has chosen this way, on what both need. Raises OSError or UnavailableError."""

    @abstractmethod
    def place(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Hand an answer's tensors over, in the thread of the models.

        Returns:
            What the frame's header says of them, and the tensors that ``deliver`` gets.

        Raises:
            OSError: the trainer has left.
            RuntimeError: no memory is left.
        """

    def deliver(self, connection: socket.socket, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Send an answer, in the thread of the connection's answers. Raises OSError: the trainer has left."""
        send(connection, header, tensors)

    def hear(self, said: Mapping[str, Any]) -> bool:
        """Take in what the trainer says of what was handed over; return False if it says something else."""
        freed = said.get("free")
        if not isinstance(freed, list):
            return False
        for number in freed:
            if type(number) is int:
                self.release(number)
        return True

    def release(self, number: int) -> None:  # noqa: B027 - some ways keep nothing
        """Use the memory of an answer again: the trainer reads it no more."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything: the trainer has left."""


class Receiver(ABC):
    """The trainer's side of one connection.

    Attributes:
        name: of the transport.
        device: where tensors of a GPU go; those in the CPU's memory stay there.
    """

    name: str
    device: torch.device

    def meet(self, connection: socket.socket, say: Say) -> None:  # noqa: B027 - most ways have nothing to agree on
        """Agree with the server on what both need. Raises OSError or UnavailableError.

        Args:
            connection: to the server.
            say: sends the server a header, from any thread.
        """

    @abstractmethod
    def take(self, placed: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what was placed, and what to tell the server; empty: nothing. Raises WireError."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything."""
