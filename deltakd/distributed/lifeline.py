"""A line from every process of a run to the first one: when one dies, the others learn which it was, and end.

Collective operations don't tell: gloo says that some connection was closed, NCCL waits for many minutes. Here each
rank holds a TCP connection to a hub in rank 0. The system closes the connections of a process that is killed, so its
end shows at once, while one that is merely busy is never suspected; keep-alive probes find a machine that is gone.

Messages are JSON objects, one a line. From a rank: ``hello`` (the run's token) with ``rank``, ``failed`` (what its
exception says), ``bye``. From the hub: ``welcome``; ``verdict``, the reason why the receiver ends; ``settled``, after
which a failed rank may end by its own error; ``closing``, once rank 0 has said ``bye``.
"""

from __future__ import annotations

import atexit
import hmac
import json
import os
import selectors
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, final

#: Seconds that the other ranks have to fail, too, once one has: what stops all of them is told by each of them.
GRACE_SECONDS = 3.0
#: Seconds to wait for the hub to answer.
CONNECT_SECONDS = 30.0
#: Seconds that a failed rank waits for rank 0 to end before it.
LAST_SECONDS = 120.0
#: Seconds without traffic before probes, between two probes, and how many of them may be lost.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_LONGEST_MESSAGE = 1 << 16

_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked worker that outlives its killed parent would keep the line open.
    for connection in list(_open):
        connection.close()


os.register_at_fork(after_in_child=_close_in_child)


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Args:
        rank: its number.
        host: the machine's name.
        pid: its process id there.
    """

    rank: int
    host: str
    pid: int

    @classmethod
    def this(cls, rank: int) -> Process:
        """The one that calls."""
        return cls(rank, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


def listen(address: str, processes: int) -> socket.socket:
    """A socket on a free port that the other ranks reach under ``address``."""
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    try:
        listener = socket.create_server((address, 0), family=family, backlog=processes + 16)
    except OSError:
        # A name that only the others resolve to this machine.
        listener = socket.create_server(("", 0), backlog=processes + 16)
    _open.add(listener)
    return listener


@final
class _Channel:
    """Messages over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.connection = connection
        self._received = b""
        _open.add(connection)

    def send(self, **message: Any) -> None:
        """Send, or do nothing: a receiver that is gone is noticed where messages are received."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for data; the messages that are whole, or None where the other end is gone."""
        try:
            data = self.connection.recv(_LONGEST_MESSAGE)
            *lines, self._received = (self._received + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        ended = not data or len(self._received) > _LONGEST_MESSAGE
        return None if ended or not all(isinstance(m, dict) for m in messages) else messages


@final
class Hub(threading.Thread):
    """What rank 0 keeps for all ranks (its own, too): finds who is gone, and tells those that are left.

    Args:
        listener: from :func:`listen`.
        token: the run's secret; connections that don't begin with it are closed.
        processes: all of the run, in the order of their ranks.
    """

    def __init__(self, listener: socket.socket, token: str, processes: Sequence[Process]) -> None:
        super().__init__(name="lifeline-hub", daemon=True)
        self._listener = listener
        self._token = token
        self._processes = processes
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._lines: dict[int, _Channel] = {}
        self._failed: dict[int, str] = {}
        self._deadline: float | None = None
        self._over = False

    def run(self) -> None:
        """Until rank 0 says ``bye``; in a run that has failed, as long as the process lives."""
        while self._listener.fileno() != -1:
            left = None if self._deadline is None or self._over else max(self._deadline - time.monotonic(), 0.0)
            for key, _ in self._selector.select(left):
                if key.data is None:
                    self._accept()
                elif self._listener.fileno() != -1:
                    self._hear(key)
            if not self._over:
                self._judge()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # whoever knocked is gone
        self._selector.register(connection, selectors.EVENT_READ, [None, _Channel(connection)])

    def _hear(self, key: selectors.SelectorKey) -> None:
        rank, channel = key.data
        messages = channel.receive()
        if messages is None:
            self._drop(channel)
            if self._lines.get(rank) is channel:
                del self._lines[rank]
                if rank not in self._failed and not self._over:
                    self._conclude(f"{self._processes[rank]} has died")
            return
        for message in messages:
            if rank is None:
                if not hmac.compare_digest(str(message.get("hello")).encode(), self._token.encode()):
                    self._drop(channel)
                    return
                rank = key.data[0] = int(message["rank"])
                self._lines[rank] = channel
                channel.send(welcome=True)
            elif "failed" in message:
                self._failed[rank] = str(message["failed"])
                self._deadline = self._deadline or time.monotonic() + GRACE_SECONDS
            elif "bye" in message:
                del self._lines[rank]
                self._drop(channel)
                if rank == 0:
                    self._close()
                return

    def _judge(self) -> None:
        """Decide whether all ranks have failed, or some have and the others must hear of it."""
        if self._deadline is None:
            return
        if all(rank in self._failed for rank in self._lines):
            self._conclude("", excepted=self._failed)
        elif time.monotonic() >= self._deadline:
            rank, reason = next(iter(self._failed.items()))
            self._conclude(f"{self._processes[rank]} has failed ({reason})", excepted=self._failed)

    def _conclude(self, verdict: str, excepted: Collection[int] = ()) -> None:
        """Tell all ranks why they end, but for some that end by an error of their own."""
        self._over = True
        # Rank 0 last: with it this hub ends.
        for rank in sorted(self._lines, reverse=True):
            if rank in excepted:
                self._lines[rank].send(settled=True)
            else:
                self._lines[rank].send(verdict=verdict)

    def _drop(self, channel: _Channel) -> None:
        self._selector.unregister(channel.connection)
        channel.connection.close()

    def _close(self) -> None:
        for channel in self._lines.values():
            channel.send(closing=True)
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()


@final
class Line(threading.Thread):
    """A rank's end of its line; when the hub says so, or is gone, the process ends with status 1 and one message.

    Args:
        address: where the hub listens.
        port: its port.
        token: the run's secret.
        rank: of this process.
        processes: all of the run; asked when one of them is to be named.
        epilogue: what the message says at its end, such as how to go on; asked then.

    Raises:
        OSError: the hub can't be reached.
    """

    def __init__(
        self, address: str, port: int, token: str, rank: int, processes: Sequence[Process], epilogue: Callable[[], str]
    ) -> None:
        super().__init__(name="lifeline", daemon=True)
        self._rank = rank
        self._processes = processes
        self._epilogue = epilogue
        self._settled = threading.Event()
        self._is_failed = self._is_closed = False
        self._channel = _Channel(socket.create_connection((address, port), timeout=CONNECT_SECONDS))
        self._channel.send(hello=token, rank=rank)
        if not self._channel.receive():
            self._channel.connection.close()
            raise ConnectionError(f"no lifeline at {address}, port {port}")
        self._channel.connection.settimeout(None)

    def run(self) -> None:
        """Wait for the hub's word."""
        while (messages := self._channel.receive()) is not None:
            for message in messages:
                if "verdict" in message:
                    self._end(message["verdict"])
                if "settled" in message:
                    self._settled.set()
                if "closing" in message:
                    self._is_closed = True
        if not self._is_closed and not self._settled.is_set():
            self._end(f"{self._processes[0]} has died")
        self._settled.set()

    def _end(self, verdict: str) -> None:
        # In one piece, so that the ranks' lines don't mix; and the main thread may hang, so that only this ends it.
        text = f"rank {self._rank} ends: {verdict}; {self._epilogue()}\n"
        try:
            os.write(2, text.encode(errors="replace"))
            sys.stdout.flush()
        finally:
            os._exit(1)

    def fail(self, reason: str) -> None:
        """Tell that this rank is about to end by an exception; returns once the others know what they have to.

        Where another rank's death is the cause, it does not return. Further calls do nothing.

        Args:
            reason: what the exception says.
        """
        if self._is_failed:
            return
        self._is_failed = True
        self._channel.send(failed=reason)
        self._settled.wait(GRACE_SECONDS + CONNECT_SECONDS)
        if self._rank != 0:
            # Who has started the ranks may kill rank 0 as soon as another one ends, in the middle of its own message.
            atexit.register(self.join, LAST_SECONDS)

    def close(self) -> None:
        """The normal end: say goodbye. After :meth:`fail` the line is kept until the process ends."""
        if self._is_failed:
            return
        self._is_closed = True
        self._channel.send(bye=True)
        if self.is_alive():
            self.join(CONNECT_SECONDS)
        self._channel.connection.close()
