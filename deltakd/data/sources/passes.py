"""The order of streamed rows: repeated passes over the shards, through a shuffle buffer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar, final

import numpy as np

from deltakd.data.sources.shards import Shard

log = logging.getLogger(__name__)

T = TypeVar("T")
#: Reads the numbered items of a shard, starting at a number.
Read = Callable[[Shard, int], Iterator[tuple[int, T]]]


class Place(NamedTuple):
    """A position between two rows of the stream, as plain numbers that a checkpoint can hold.

    Args:
        epoch: the pass, from 0.
        shard: position of the next row's shard in the order of the pass.
        record: number of the next row in its shard.
        rows: rows of the pass before it.
    """

    epoch: int = 0
    shard: int = 0
    record: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Buffer(Generic[T]):
    """A stretch of the stream, shuffled.

    Args:
        items: its rows, in training order.
        read: number of rows read for it; ``Passes.keep`` may have left out some.
        after: where the next buffer begins.
    """

    items: list[T]
    read: int
    after: Place


@final
class Passes(Generic[T]):
    """Cuts successive passes over the shards into buffers, each shuffled in memory; a pure function of the seed.

    Every pass reads the shards one after the other, in a new order. Their rows fill a buffer; a full buffer is
    shuffled, handed out and filled again. So rows are mixed within ``size`` rows of each other, and any buffer can be
    rebuilt from its position: nothing has to be saved, and of the data before it only the beginning of one shard has to
    be read. (A buffer that swaps single rows mixes a little further, but every checkpoint would have to contain it.) A
    buffer that holds a whole pass gives the order of ``RowStream``.

    Args:
        shards: the data.
        read: reads a shard.
        seed: for the orders.
        size: rows of a buffer.
        limit: keep only the first N rows of the shards, as listed, in every pass.
        keep: chooses a buffer's rows for training, before it is shuffled; None: all.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        read: Read[T],
        *,
        seed: int,
        size: int,
        limit: int | None = None,
        keep: Callable[[list[T]], list[T]] | None = None,
    ) -> None:
        self.shards = shards
        self.size = size
        self._read = read
        self._seed = seed
        self._limit = limit
        self._keep = keep
        self._rows: Iterator[tuple[Place, T]] = iter(())
        #: The first row that is in no buffer yet, with its position; reading continues after it.
        self._ahead: tuple[Place, T] | None = None
        self._empty: set[int] = set()

    def buffer_at(self, place: Place) -> Buffer[T]:
        """Return the buffer that begins at a position; only one other than the last buffer's end needs a search.

        Raises:
            ValueError: a shard can't be read, has a bad row or has changed, or a whole pass has no row.
        """
        if self._ahead is None or self._ahead[0] != place:
            self._rows = self._rows_from(place)
            self._ahead = next(self._rows, None)
        items: list[T] = []
        while self._ahead is not None and len(items) < self.size:
            items.append(self._ahead[1])
            self._ahead = next(self._rows, None)
        if not items:
            raise ValueError(f"the stream of {self.shards[0].name} and others has no rows; give data with at least one")
        after = Place(place.epoch + 1) if self._ahead is None else self._ahead[0]
        kept = items if self._keep is None else self._keep(items)
        order = self._draw(place.epoch, 0, place.rows // self.size).permutation(len(kept))
        return Buffer([kept[index] for index in order], len(items), after)

    def _rows_from(self, place: Place) -> Iterator[tuple[Place, T]]:
        """Yield the remaining rows of a pass, each with its position."""
        order = np.arange(len(self.shards))
        if self._limit is None:
            order = self._draw(place.epoch, 2, 0).permutation(len(self.shards))
        rows, record = place.rows, place.record
        for at in range(place.shard, len(order)):
            if self._limit is not None and rows >= self._limit:
                return
            shard = self.shards[order[at]]
            shard.check()
            before = rows
            for number, row in self._read(shard, record):
                if self._limit is not None and rows >= self._limit:
                    return
                yield Place(place.epoch, at, number, rows), row
                rows += 1
            if rows == before and not record:
                self._note_empty(shard)
            record = 0

    def _note_empty(self, shard: Shard) -> None:
        if shard.number not in self._empty:
            self._empty.add(shard.number)
            log.warning("%s has no rows; the stream continues with the next shard.", shard.name)

    def _draw(self, epoch: int, purpose: int, number: int) -> np.random.Generator:
        # ``RowStream`` draws the permutation of a whole pass from [seed, epoch], which is the same as [..., 0, 0].
        return np.random.Generator(np.random.PCG64([self._seed, epoch, purpose, number]))
