"""Requests of several trainers, taken in turn."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar, final

C = TypeVar("C")
R = TypeVar("R")


@final
class FairQueue(Generic[C, R]):
    """A queue per client; ``take`` serves the clients one after the other, whatever each has asked for.

    Args:
        most: a client's requests that wait or are being answered; ``put`` waits while there are as many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._waiting: dict[C, deque[R]] = {}
        self._open: dict[C, int] = {}
        self._turns: deque[C] = deque()

    def join(self, client: C) -> None:
        """Admit a client."""
        with self._changed:
            self._waiting[client], self._open[client] = deque(), 0
            self._turns.append(client)

    def leave(self, client: C) -> None:
        """Forget a client and what it asked for."""
        with self._changed:
            if self._waiting.pop(client, None) is not None:
                del self._open[client]
                self._turns.remove(client)
            self._changed.notify_all()

    @property
    def clients(self) -> int:
        """Number of clients."""
        with self._changed:
            return len(self._turns)

    def put(self, client: C, request: R) -> bool:
        """Add a request, once the client has room for one; return False if the client has left."""
        with self._changed:
            self._changed.wait_for(lambda: self._open.get(client, 0) < self._most)
            if client not in self._waiting:
                return False
            self._waiting[client].append(request)
            self._open[client] += 1
            self._changed.notify_all()
            return True

    def take(self, timeout: float) -> tuple[C, R] | None:
        """Return the next request and its client; None: nobody asked in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: any(self._waiting.values()), timeout):
                return None
            while not self._waiting[self._turns[0]]:
                self._turns.rotate(-1)
            client = self._turns[0]
            self._turns.rotate(-1)
            return client, self._waiting[client].popleft()

    def done(self, client: C) -> None:
        """Say that the answer to a request was sent: the client may ask again."""
        with self._changed:
            if client in self._open:
                self._open[client] -= 1
            self._changed.notify_all()
