"""Addresses of a server of references: ``tcp://host:port``, or ``unix:///path`` within a machine."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

#: Seconds until a connection stands, and for each answer while the two sides introduce themselves.
GREETING_SECONDS = 10.0
#: Longest path of a Unix socket, in bytes (Linux: 108 with its end; macOS: 104).
_LONGEST_PATH = 103


class Address(NamedTuple):
    """Where a server listens: ``host`` and ``port``, or ``path``."""

    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str | None, key: str) -> Address:
        """Read an address.

        Args:
            url: the address.
            key: what the user calls it.

        Raises:
            ValueError: it is none.
        """
        try:
            parsed = urlparse(url or "")
            host, port = parsed.hostname or "", parsed.port or 0
        except ValueError:
            parsed, host, port = urlparse(""), "", 0
        if parsed.scheme == "tcp" and host and port and parsed.path in ("", "/") and parsed.username is None:
            return cls(host, port, "")
        if parsed.scheme == "unix" and not host and 1 < len(os.fsencode(parsed.path)) <= _LONGEST_PATH:
            return cls("", 0, parsed.path)
        given = "null" if url is None else repr(url)
        raise ValueError(
            f"{key} is {given}; it must be the address of a server of references: tcp://127.0.0.1:7711, or within a "
            f"machine unix:///path/to/socket (at most {_LONGEST_PATH} bytes)"
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix://{self.path}" if self.path else f"tcp://{host}:{self.port}"

    def connect(self) -> socket.socket:
        """Return a connection that waits GREETING_SECONDS for an answer. Raises OSError."""
        if not self.path:
            return socket.create_connection((self.host, self.port), timeout=GREETING_SECONDS)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(GREETING_SECONDS)
        try:
            connection.connect(self.path)
        except OSError:
            connection.close()
            raise
        return connection

    def listen(self) -> socket.socket:
        """Return a listening socket; that of a path admits its owner alone.

        Raises:
            ValueError: the address is taken, or not of this machine.
        """
        try:
            if not self.path:
                family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
                return socket.create_server((self.host, self.port), family=family)
            return self._listen_at_path()
        except OSError as error:
            # Python adds to the system's reason, which the sentence says already.
            reason = str(error) if error.errno is None else os.strerror(error.errno)
            raise ValueError(
                f"{self} can't be listened on ({reason}); is another server there? Give a free address of this machine"
            ) from None

    def check_free(self) -> None:
        """Listen for a moment. Raises ValueError as ``listen``."""
        self.listen().close()
        self.remove()

    def _listen_at_path(self) -> socket.socket:
        path = Path(self.path)
        if path.exists() and stat.S_ISSOCK(path.lstat().st_mode):
            # A killed server leaves its socket behind; a living one answers.
            with contextlib.suppress(ConnectionRefusedError):
                self.connect().close()
                raise OSError("a server answers there")
            path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(self.path)
        finally:
            os.umask(before)
        listener.listen()
        return listener

    def remove(self) -> None:
        """Remove the path of a closed listener."""
        if self.path:
            Path(self.path).unlink(missing_ok=True)


def keep_alive(connection: socket.socket) -> None:
    """Let the system notice within a minute that the other machine is gone, and send small frames at once."""
    connection.settimeout(None)
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def limit_silence(connection: socket.socket, seconds: float) -> None:
    """Let receiving fail after some seconds without a byte; sending still waits as long as it takes."""
    whole = int(seconds)
    moment = struct.pack("ll", whole, int((seconds - whole) * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, moment)
