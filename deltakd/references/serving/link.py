"""Answers over a group of two: this connection's server and trainer, joined by gloo (CPUs) or NCCL (GPUs).

The group is made for one connection, after the token was checked, and goes with it. It is outside of PyTorch's process
groups, so a trainer's own (DDP, FSDP) never meet it. What the two need to find each other travels over the connection:
no store listens anywhere.

An answer takes three steps. The server says what comes; the trainer begins to receive, and says so; then the server
sends. So a trainer that is busy or stopped holds up its own answers, and never a kernel on the server's GPU: kernels of
several groups on one device can't come to wait for each other. One thread on each side does all of a connection's
transfers, in the order of the answers.
"""

from __future__ import annotations

import base64
import hmac
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor

from deltakd.references.serving.endpoints import Receiver, Say, Sender, UnavailableError
from deltakd.references.serving.wire import WireError, describe, read_description, receive, send

#: Ranks in the group of two.
SERVER, TRAINER = 0, 1
#: Seconds until the two have found each other.
MEETING_SECONDS = 120.0
#: Seconds that a transfer may take, beyond those of its bytes at the slowest network worth using.
_TRANSFER_SECONDS = 30.0
_SLOWEST_BYTES_PER_SECOND = 10e6
#: Random bytes by which both sides see that the group joins them.
_PROOF_BYTES = 32


class Link(Protocol):
    """One side of a group of two. One thread uses it at a time.

    ``check`` is called now and then in a transfer, and raises OSError if it is to end. All raise OSError if the other
    side is gone, or too slow; a link that failed is only good for closing.
    """

    def room(self, described: Mapping[str, tuple[torch.dtype, list[int]]]) -> dict[str, Tensor]:
        """Return memory to receive tensors in, by name."""
        ...

    def send(self, tensors: Sequence[Tensor], seconds: float, check: Callable[[], None]) -> None:
        """Send tensors, all computed and contiguous; return once they may be written over."""
        ...

    def receive(
        self, tensors: Sequence[Tensor], seconds: float, begun: Callable[[], None], check: Callable[[], None]
    ) -> None:
        """Receive tensors; ``begun`` is called once the other side may send. Return once they can be read."""
        ...

    def close(self) -> None:
        """Leave the group, whatever it is doing."""
        ...


class Meeting:
    """Values by key that the two sides of a connection tell each other before requests begin.

    Args:
        connection: nothing else may be received on it meanwhile.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._known: dict[str, bytes] = {}

    def tell(self, key: str, value: bytes) -> None:
        """Tell the other side a value. Raises OSError."""
        send(self.connection, {"key": key, "value": base64.b64encode(value).decode()})

    def hear(self, key: str) -> bytes:
        """Wait for a value of the other side.

        Raises:
            WireError: it is gone, or says something else.
            UnavailableError: it says why there can be no group.
        """
        while key not in self._known:
            said = receive(self.connection, 0).header
            if "refused" in said:
                raise UnavailableError(str(said["refused"])[:300])
            try:
                self._known[str(said["key"])] = base64.b64decode(str(said["value"]), validate=True)
            except (KeyError, ValueError):
                raise WireError("it does not say how to form a group") from None
        return self._known[key]


#: Forms the group: from the meeting and the own rank. Raises UnavailableError or OSError.
Form = Callable[[Meeting, int], Link]


@final
class LinkSender(Sender):
    """The server's side.

    Args:
        name: of the transport.
        form: forms the group.
        device: that the group sends from; answers are brought there.
    """

    def __init__(self, name: str, form: Form, device: torch.device) -> None:
        self.name = name
        self._form = form
        self._device = device
        self._link: Link | None = None
        self._changed = threading.Condition()
        self._sent = 0
        self._awaited = -1
        self._is_moving = False
        self._is_closed = False

    def meet(self, connection: socket.socket) -> None:
        """Form the group, and prove that it joins this trainer."""
        meeting = Meeting(connection)
        connection.settimeout(MEETING_SECONDS)
        try:
            link = self._link = self._form(meeting, SERVER)
            proof = secrets.token_bytes(_PROOF_BYTES)
            meeting.tell("proof", proof)
            meeting.hear("begun")
            whole = torch.frombuffer(bytearray(proof), dtype=torch.uint8).to(self._device)
            _synchronize(self._device)
            link.send([whole], MEETING_SECONDS, lambda: None)
            meeting.hear("joined")
        except UnavailableError as error:
            send(connection, {"refused": str(error)})
            raise
        finally:
            connection.settimeout(None)

    def place(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Bring the tensors to where the group sends from, once the device has computed them."""
        brought = {name: tensor.detach().to(self._device).contiguous() for name, tensor in tensors.items()}
        # The transfer runs in another thread, on another stream.
        _synchronize(self._device)
        self._sent += 1
        return {"placed": {"number": self._sent, "tensors": describe(brought)}}, brought

    def deliver(self, connection: socket.socket, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Announce an answer, wait until the trainer receives it, and send it."""
        send(connection, header)
        if "placed" not in header:
            return
        assert self._link is not None
        number = header["placed"]["number"]
        with self._changed:
            self._changed.wait_for(lambda: self._awaited >= number or self._is_closed)
            self._check()
            self._is_moving = True
        try:
            sent = list(tensors.values())
            self._link.send(sent, _allowed_seconds(sent), self._check)
        finally:
            with self._changed:
                self._is_moving = False
                if self._is_closed:
                    self._link.close()

    def hear(self, said: Mapping[str, Any]) -> bool:
        """Take in that the trainer waits for an answer."""
        if "awaited" not in said:
            return False
        if type(said["awaited"]) is int:
            with self._changed:
                self._awaited = said["awaited"]
                self._changed.notify_all()
        return True

    def close(self) -> None:
        """Leave the group; a transfer ends as soon as it notices."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            if self._link is not None and not self._is_moving:
                self._link.close()

    def _check(self) -> None:
        if self._is_closed:
            raise WireError("the trainer has left")


@final
class LinkReceiver(Receiver):
    """The trainer's side.

    Args:
        name: of the transport.
        form: forms the group.
    """

    def __init__(self, name: str, form: Form) -> None:
        self.name = name
        self.device = torch.device("cpu")
        self._form = form
        self._link: Link | None = None
        self._connection: socket.socket | None = None
        self._say: Say = lambda said: None

    def meet(self, connection: socket.socket, say: Say) -> None:
        """Form the group, and check that it joins this server."""
        self._connection, self._say = connection, say
        meeting = Meeting(connection)
        link = self._link = self._form(meeting, TRAINER)
        proof = meeting.hear("proof")
        found = link.room({"proof": (torch.uint8, [_PROOF_BYTES])})["proof"]
        try:
            link.receive([found], MEETING_SECONDS, lambda: meeting.tell("begun", b""), self._check_server)
        except WireError as error:
            self._check_server()
            raise UnavailableError(f"the group was formed but carries no data ({error})") from None
        if not hmac.compare_digest(bytes(found.cpu().numpy()), proof):
            raise UnavailableError("the group joins another process than the server")
        meeting.tell("joined", b"")

    def take(self, placed: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Receive an answer's tensors.

        Raises:
            WireError: the server is gone, or too slow.
        """
        assert self._link is not None
        try:
            number, described = int(placed["number"]), read_description(placed["tensors"])
        except (KeyError, TypeError, ValueError):
            raise WireError("it does not say what it sends") from None
        try:
            found = self._link.room(described)
        except RuntimeError as error:
            raise WireError(f"there is no room for what it sends ({error})") from None
        tensors = list(found.values())
        self._link.receive(
            tensors, _allowed_seconds(tensors), lambda: self._say({"awaited": number}), self._check_server
        )
        return found, {}

    def close(self) -> None:
        """Leave the group."""
        if self._link is not None:
            self._link.close()

    def _check_server(self) -> None:
        """Raise WireError if the server has closed the connection; a group alone may not notice."""
        assert self._connection is not None
        try:
            is_closed = not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if is_closed:
            raise WireError("it closed the connection")


def _allowed_seconds(tensors: Sequence[Tensor]) -> float:
    return _TRANSFER_SECONDS + sum(tensor.nbytes for tensor in tensors) / _SLOWEST_BYTES_PER_SECOND


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
