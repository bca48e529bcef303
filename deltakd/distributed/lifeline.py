"""A connection from every rank to rank 0: when a process dies, the others learn which one, and exit.

Collective operations don't say: gloo reports that some connection was closed, NCCL waits for many minutes. Here each
rank holds a TCP connection to a hub in rank 0. The operating system closes the connections of a killed process, so its
death shows at once; a busy process is never suspected. Keep-alive probes detect a machine that is gone.

Messages are JSON objects, one per line. From a rank: ``hello`` (the run's token) with ``rank``; ``failed`` (its
exception's message); ``bye``. From the hub: ``welcome``; ``verdict``, the reason why the receiver must exit;
``settled``, after which a failed rank may exit with its own error; ``closing``, once rank 0 has said ``bye``.
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

#: Seconds after a failure in which other ranks may fail independently: each then reports its own error.
GRACE_SECONDS = 3.0
#: Seconds to wait for the hub to answer.
CONNECT_SECONDS = 30.0
#: Seconds that a failed rank waits for rank 0 to exit first.
LAST_SECONDS = 120.0
#: Seconds without traffic before the first probe, seconds between probes, and how many may be lost.
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
        return cls(rank, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


def listen(address: str, processes: int) -> socket.socket:
    """Return a socket on a free port that the other ranks reach under ``address``."""
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    try:
        listener = socket.create_server((address, 0), family=family, backlog=processes + 16)
    except OSError:
        # The name resolves to this machine only elsewhere: listen on all interfaces.
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
        """Send; ignore a receiver that is gone, since ``receive`` notices that."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for data; return the complete messages, or None if the other end is gone."""
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
    """Runs in rank 0 with a line from every rank, including its own; detects lost ranks and tells the rest.

    Args:
        listener: from :func:`listen`.
        token: the run's secret; connections that don't begin with it are closed.
        processes: all processes of the run, by rank.
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
        """Serve until rank 0 says ``bye``; after a failure, as long as the process lives."""
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
        """Conclude once all ranks have failed, or once the others must be told that some have."""
        if self._deadline is None:
            return
        if all(rank in self._failed for rank in self._lines):
            self._conclude("", excepted=self._failed)
        elif time.monotonic() >= self._deadline:
            rank, reason = next(iter(self._failed.items()))
            self._conclude(f"{self._processes[rank]} has failed ({reason})", excepted=self._failed)

    def _conclude(self, verdict: str, excepted: Collection[int] = ()) -> None:
        """Tell all ranks why they must exit, except those that exit with their own error."""
        self._over = True
        # Rank 0 last: the hub dies with it.
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
    """A rank's end of its line. If the hub says so, or is gone, the process exits with status 1 and one message.

    Args:
        address: where the hub listens.
        port: its port.
        token: the run's secret.
        rank: of this process.
        processes: all processes of the run, by rank.
        epilogue: returns the end of that message, such as how to resume.

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
        """Wait for messages from the hub."""
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
        # One write, so that the ranks' lines don't mix. os._exit, since the main thread may hang.
        text = f"rank {self._rank} ends: {verdict}; {self._epilogue()}\n"
        try:
            os.write(2, text.encode(errors="replace"))
            sys.stdout.flush()
        finally:
            os._exit(1)

    def fail(self, reason: str) -> None:
        """Report that this rank is about to exit with an exception; return once the others know.

        Does not return if another rank's death is the cause. Further calls do nothing.

        Args:
            reason: the exception's message.
        """
        if self._is_failed:
            return
        self._is_failed = True
        self._channel.send(failed=reason)
        self._settled.wait(GRACE_SECONDS + CONNECT_SECONDS)
        if self._rank != 0:
            # A launcher may kill rank 0 as soon as another rank exits, even in the middle of rank 0's message.
            atexit.register(self.join, LAST_SECONDS)

    def close(self) -> None:
        """Close the line of a run that succeeded. After :meth:`fail` it stays open until the process exits."""
        if self._is_failed:
            return
        self._is_closed = True
        self._channel.send(bye=True)
        if self.is_alive():
            self.join(CONNECT_SECONDS)
        self._channel.connection.close()
