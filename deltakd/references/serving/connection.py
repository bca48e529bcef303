"""A trainer's connection to a server of references, which may go and come back."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from deltakd.io.errors import LostServerError, RefusedError, ServerError
from deltakd.references.serving.address import Address, keep_alive, limit_silence
from deltakd.references.serving.endpoints import UnavailableError
from deltakd.references.serving.secret import greet_as_trainer
from deltakd.references.serving.transports import Chosen, Transport, candidates, choose
from deltakd.references.serving.wire import Frame, WireError, receive, send

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
#: Seconds without a sign of life after which a server counts as lost; it sends one every 5 seconds.
SILENCE_SECONDS = 30.0
#: Seconds between two tries to reach a server.
_PAUSE = 0.5
#: Requests that are sent and not answered; more wait here. The server reads on while it has fewer than twice as many.
_MOST_OPEN = 32
#: Seconds for the thread that receives to let go of a group of two.
_FAREWELL_SECONDS = 10.0


class _Asked(NamedTuple):
    """A request, kept until it is answered.

    Args:
        tensors: of the request.
        roles: to run it; None: all of the connection's.
    """

    tensors: dict[str, Tensor]
    roles: list[str] | None


@final
class ServerConnection:
    """Sends requests, and hands out the answers by number; a thread receives them.

    Requests may come from several threads; answers are taken by one. If the server is lost, whoever waits for an answer
    connects again, and all unanswered requests are sent again.

    Args:
        address: of the server.
        token: that both sides know.
        roles: whose hidden states are asked for.
        wait_s: seconds to wait for a server that is not there, or not any more.
        transport: how tensors come (``transports``).
        device: where the trainer wants them.

    Raises:
        ServerError: it is not there in time, or refuses.
    """

    def __init__(
        self,
        address: Address,
        token: bytes,
        roles: Collection[str],
        wait_s: float,
        transport: Transport = "auto",
        device: torch.device = CPU,
    ) -> None:
        self._address = address
        self._token = token
        self._roles = sorted(roles)
        self._wait_s = wait_s
        self._transports = candidates(transport, device)
        self._device = device
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._lost = "it was not there"
        #: What went wrong here, and would go wrong again if the server were asked again.
        self._fault: Exception | None = None
        self._next = 0
        self._asked: dict[int, _Asked] = {}
        self._unsent: deque[int] = deque()
        self._open: set[int] = set()
        self._answers: dict[int, Frame] = {}
        #: Seconds in which nothing else was done but wait for answers.
        self.waited = 0.0
        self.sent_bytes = self.received_bytes = 0
        #: How tensors come, as agreed with the server.
        self.chosen: Chosen
        #: What determines the server's answers, and the heads of the roles.
        self.content: dict[str, Any] = {}
        self.welcome = self._reach(heads=True)
        self.content = self.welcome.header["content"]

    def ask(self, tensors: Mapping[str, Tensor], roles: Collection[str] | None = None) -> int:
        """Send a request and return its number; never waits for a server that is lost.

        Args:
            tensors: of the request.
            roles: to run it; None: all of the connection's.
        """
        kept = _Asked(dict(tensors), None if roles is None else sorted(roles))
        with self._changed:
            number = self._next
            self._next += 1
            self._asked[number] = kept
            self._unsent.append(number)
        self._send_next()
        return number

    def is_open(self, number: int) -> bool:
        """Return True if a request's answer was not taken yet."""
        with self._changed:
            return number in self._asked

    def take(self, number: int) -> Frame:
        """Wait for the answer to a request and return it, once.

        Raises:
            LostServerError: the server is gone, and did not come back in time.
            ServerError: it refuses the request, or its answer can't be taken in here.
        """
        started = time.perf_counter()
        while (answer := self._answer(number)) is None:
            if self._fault is not None:
                raise ServerError(
                    f"an answer of the server of references {self._address} could not be received: {self._fault}"
                ) from self._fault
            self._reconnect()
        self.waited += time.perf_counter() - started
        if "refused" in answer.header:
            raise ServerError(f"the server of references {self._address} refused a batch: {answer.header['refused']}")
        return answer

    def send_to(self, device: torch.device) -> None:
        """Let tensors that come by a GPU's memory go to ``device`` from now on."""
        with self._changed:
            self._device = device
            if self.chosen.receiver is not None:
                self.chosen.receiver.device = device

    def close(self) -> None:
        """Leave the server; open requests are forgotten."""
        with self._changed:
            self._asked.clear()
            self._answers.clear()
            self._unsent.clear()
            connection, self._socket = self._socket, None
        _shut(connection)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_FAREWELL_SECONDS)

    def _answer(self, number: int) -> Frame | None:
        """Wait for an answer; None: the server is lost."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._answers or self._socket is None)
            if number not in self._answers:
                return None
            del self._asked[number]
            return self._answers.pop(number)

    def _send_next(self) -> None:
        """Send the requests that wait, in their order, while fewer than the most are open."""
        with self._sending:
            while True:
                with self._changed:
                    connection = self._socket
                    if connection is None or not self._unsent or len(self._open) >= _MOST_OPEN:
                        return
                    number = self._unsent.popleft()
                    self._open.add(number)
                    asked = self._asked[number]
                header = {"number": number} | ({} if asked.roles is None else {"roles": asked.roles})
                try:
                    self.sent_bytes += send(connection, header, asked.tensors)
                except OSError as error:
                    self._lose(connection, error.strerror or str(error))
                    return

    def _lose(self, connection: socket.socket, why: str) -> None:
        """Forget a connection that failed, if it is still the current one."""
        with self._changed:
            if self._socket is connection:
                self._socket, self._lost = None, why
            self._changed.notify_all()
        _shut(connection)

    def _receive(self, connection: socket.socket, chosen: Chosen) -> None:
        try:
            while True:
                frame = self._taken(connection, chosen, receive(connection, None))
                with self._changed:
                    number = frame.header.get("number")
                    self._open.discard(number)
                    # A request may have been sent twice, before and after the server was lost.
                    if number in self._asked:
                        self._answers[number] = frame
                        self.received_bytes += sum(tensor.nbytes for tensor in frame.tensors.values())
                        self._changed.notify_all()
                self._send_next()
        except OSError as error:
            self._lose(connection, str(error))
        except Exception as error:
            # Such as no memory left on the device. Whoever waits for an answer must hear of it.
            self._fault = error
            self._lose(connection, str(error))
        finally:
            if chosen.receiver is not None:
                chosen.receiver.close()

    def _taken(self, connection: socket.socket, chosen: Chosen, frame: Frame) -> Frame:
        """Return an answer with its tensors, wherever the server has put them."""
        if chosen.receiver is None or "placed" not in frame.header:
            return frame
        tensors, said = chosen.receiver.take(frame.header["placed"])
        if said:
            self._say(connection, said)
        return Frame(frame.header, tensors)

    def _reconnect(self) -> None:
        """Reach the server again, and ask it what is not answered yet."""
        welcome = self._reach(heads=False)
        if welcome.header["content"] != self.content:
            self.close()
            raise ServerError(
                f"the server of references {self._address} came back with other models than it had: "
                f"{_difference(self.content, welcome.header['content'])}; start it as before"
            )
        log.warning("The server of references %s is back; training goes on.", self._address)
        self._send_next()

    def _reach(self, *, heads: bool) -> Frame:
        """Connect, and wait for the server if it is not there.

        Raises:
            LostServerError: it is not there in time.
            RefusedError: it has another token, or lacks a role.
        """
        started, told = time.monotonic(), False
        while True:
            try:
                return self._connect(heads)
            except OSError as error:
                why = f"{self._lost}, and now: {error.strerror or error}" if self.content else error.strerror or error
            passed = time.monotonic() - started
            if passed >= self._wait_s:
                raise LostServerError(
                    f"the server of references {self._address} is {'gone' if self.content else 'not there'} ({why}), "
                    f"and did not come{' back' if self.content else ''} within reference.wait_s={self._wait_s:g} "
                    "seconds; start it with `python -m deltakd.serve` and the overrides of this run"
                )
            if not told:
                log.warning(
                    "The server of references %s is %s (%s); waiting for it, at most %g s.",
                    self._address,
                    "gone" if self.content else "not there",
                    why,
                    self._wait_s,
                )
                told = True
            time.sleep(min(_PAUSE, self._wait_s - passed))

    def _connect(self, heads: bool) -> Frame:
        connection = self._address.connect()
        try:
            greet_as_trainer(connection, self._token)
            send(connection, {"roles": self._roles, "heads": heads, "transports": self._transports})
            keep_alive(connection)
            limit_silence(connection, SILENCE_SECONDS)
            welcome = receive(connection, None)
            if "refused" in welcome.header:
                raise RefusedError(str(welcome.header["refused"])[:300], 404)
            if not isinstance(welcome.header.get("content"), dict):
                raise WireError("it does not say what it holds")
            chosen = self._choose(connection)
        except RefusedError as error:
            connection.close()
            raise RefusedError(f"the server of references {self._address}: {error}", error.status) from None
        except BaseException:
            connection.close()
            raise
        with self._changed:
            self._socket, self.chosen = connection, chosen
            self._unsent = deque(number for number in self._asked if number not in self._answers)
            self._open.clear()
            if chosen.receiver is not None:
                chosen.receiver.device = self._device
        self._thread = threading.Thread(target=self._receive, args=(connection, chosen), name="references", daemon=True)
        self._thread.start()
        return welcome

    def _choose(self, connection: socket.socket) -> Chosen:
        """Agree with the server on how tensors come. Raises RefusedError if it can't be as the config says."""
        offered = receive(connection, 0).header.get("offers")
        if not isinstance(offered, dict):
            raise WireError("it offers no transport")
        agreed, receiver = False, None
        try:
            chosen = choose(self._transports, offered, self._device)
            send(connection, {"transport": chosen.name})
            receiver = chosen.receiver
            if receiver is not None:
                receiver.meet(connection, lambda said: self._say(connection, said))
            agreed = True
            return chosen
        except UnavailableError as error:
            if receiver is not None and self.content:
                # It worked before; a server that has just come back may need another try.
                raise WireError(str(error)) from None
            reason = f"reference.transport={self._transports[0]}: {error}; give reference.transport=auto"
            raise RefusedError(reason, 404) from None
        finally:
            if receiver is not None and not agreed:
                receiver.close()

    def _say(self, connection: socket.socket, said: Mapping[str, Any]) -> None:
        with self._sending:
            send(connection, said)


def _shut(connection: socket.socket | None) -> None:
    """Close a connection on which threads may be waiting."""
    if connection is not None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()


def _difference(before: Any, now: Any, name: str = "") -> str:
    """Return the first key at which two contents differ, with both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        key = next(key for key in [*before, *now] if before.get(key) != now.get(key))
        return _difference(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    return f"{name} is {now}, and was {before}"
