"""Work done ahead of its use, in a thread or not."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar, final

T = TypeVar("T")

#: Seconds between checks that items are still needed.
_PATIENCE = 0.2


class _Item(NamedTuple, Generic[T]):
    item: T


@final
class Ahead(Generic[T]):
    """Runs an iterator in a thread, some items ahead, and raises its errors here.

    A context manager around an iterator of the same items; leaving it ends the thread.

    Args:
        items: the iterator; nothing else may use it.
        depth: most items made and not yet taken.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._made: queue.Queue[_Item[T] | BaseException | None] = queue.Queue(depth)
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def __enter__(self) -> Iterator[T]:
        self._wanted.set()
        self._thread.start()
        return self._taken()

    def __exit__(self, *_: object) -> None:
        self._wanted.clear()
        self._thread.join()

    def _taken(self) -> Iterator[T]:
        while (made := self._made.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            yield made.item

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(_Item(item)):
                    return
            self._put(None)
        # Raised again where the items are taken.
        except BaseException as error:
            self._put(error)

    def _put(self, made: _Item[T] | BaseException | None) -> bool:
        """Wait for room; return False if no more items are needed."""
        while self._wanted.is_set():
            try:
                self._made.put(made, timeout=_PATIENCE)
                return True
            except queue.Full:
                continue
        return False


def begun_ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yield items, ``depth`` further ones made before each; for items whose making begins work done elsewhere."""
    made: deque[T] = deque()
    for item in items:
        made.append(item)
        if len(made) > depth:
            yield made.popleft()
    yield from made
