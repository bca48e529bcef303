"""Rows of a cache, looked up by content: order, batch size and number of ranks do not matter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from deltakd.data import EncodedSet
from deltakd.models.roles import OWN_ROLES
from deltakd.references.store import OFFSETS, OTHER_OFFSETS, ROW_KEYS, CacheStore, StoreError, map_arrays
from deltakd.types import Batch

#: Bytes per row key.
KEY_BYTES = 16


def row_key(*tokens: NDArray[Any], images: bytes = b"", pair: int | None = None) -> bytes:
    """Return a 128-bit hash of a row's T token ids and labels, without padding; with two tokenizers, of both sides'.

    Args:
        tokens: ids and labels.
        images: the digest of its images, if it has any: their tokens are the same whatever they show.
        pair: the number of the pair of teachers that judges it: equal rows of two tasks may have two. None: rows are
            not routed.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for array in tokens:
        digest.update(array.astype("<i4", copy=False).tobytes())
    digest.update(images)
    if pair is not None:
        digest.update(b"pair %d" % pair)
    return digest.digest()


def keys_of_set(encoded: EncodedSet) -> NDArray[np.uint8]:
    """Return [n, 16], the keys of all rows of a set."""
    return keys_of_rows(encoded, range(len(encoded)))


def keys_of_rows(encoded: EncodedSet, rows: Iterable[int]) -> NDArray[np.uint8]:
    """Return [n, 16], the keys of some rows of a set."""
    sides = [encoded] if encoded.other is None else [encoded, encoded.other]
    bounds = [side.offsets.tolist() for side in sides]

    def tokens(row: int) -> Iterator[NDArray[Any]]:
        for side, of in zip(sides, bounds, strict=True):
            yield side.input_ids[of[row] : of[row + 1]]
            yield side.labels[of[row] : of[row + 1]]

    images, tasks = encoded.images, encoded.tasks
    return as_keys(
        row_key(
            *tokens(row),
            images=b"" if images is None else images.digest(row),
            pair=None if tasks is None else tasks.route(row),
        )
        for row in rows
    )


def keys_of_batch(batch: Batch) -> NDArray[np.uint8]:
    """Return [r, 16], the keys of the batch's rows that have a valid token, in order."""
    labelled = batch.valid_BT.any(1).cpu().numpy()
    streams = [batch] if batch.other is None else [batch, batch.other.stream]
    sides = [
        (
            stream.input_ids.cpu().numpy(),
            stream.labels.cpu().numpy(),
            stream.attention_mask.sum(1).cpu().numpy(),
        )
        for stream in streams
    ]

    def tokens(row: int) -> Iterator[NDArray[Any]]:
        for ids_BT, labels_BT, lengths in sides:
            yield ids_BT[row, : lengths[row]]
            yield labels_BT[row, : lengths[row]]

    images = batch.image_digests or [b""] * len(labelled)
    pairs = pairs_of_batch(batch)
    return as_keys(
        row_key(*tokens(row), images=images[row], pair=pairs.get(row)) for row in np.flatnonzero(labelled).tolist()
    )


def pairs_of_batch(batch: Batch) -> dict[int, int]:
    """Return row -> number of its pair of teachers, in the order of the rows, of those that have a valid token.

    Empty if rows are not routed.
    """
    rows_N = batch.rows_N
    return dict(sorted((row, route.pair) for route in batch.routes for row in set(rows_N[route.tokens].tolist())))


def as_keys(keys: Iterable[bytes]) -> NDArray[np.uint8]:
    """Return the keys as [n, 16] uint8."""
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)


@final
class RowIndex:
    """Finds rows in a cache; their arrays stay on disk until they are read.

    Args:
        store: the cache.

    Raises:
        StoreError: two rows share half a key, which a sound cache does not have.
    """

    def __init__(self, store: CacheStore) -> None:
        self._shards = [map_arrays(store.path / shard.file) for shard in store.manifest.shards]
        keys = [np.array(arrays[ROW_KEYS]) for arrays in self._shards]
        pairs = _halves(np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *keys]))
        order = np.argsort(pairs[:, 0], kind="stable")
        #: The keys' first halves in ascending order, and the second halves with them.
        self._first, self._second = pairs[order, 0], pairs[order, 1]
        if (self._first[1:] == self._first[:-1]).any():
            raise StoreError(f"reference.path={store.path} holds a row twice; remove it and make the cache again")
        none = np.empty(0, np.int64)
        shard_of = [np.full(len(found), number, np.int64) for number, found in enumerate(keys)]
        self._shard = np.concatenate([none, *shard_of])[order]
        self._bounds = {name: self._bounds_of(name, order) for name in (OFFSETS, OTHER_OFFSETS) if self.holds(name)}

    def _bounds_of(self, name: str, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return [rows, 2]: where the tokens of each row start and stop in their shard."""
        offsets = [np.array(arrays[name], np.int64) for arrays in self._shards]
        none = np.empty((0, 2), np.int64)
        return np.concatenate([none, *(np.stack([of[:-1], of[1:]], axis=1) for of in offsets)])[order]

    def __len__(self) -> int:
        return len(self._first)

    def holds(self, name: str) -> bool:
        """Return True if a shard has this array."""
        return any(name in arrays for arrays in self._shards)

    def find(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return [n], the positions of the rows with keys [n, 16]; −1 for a row that is not in the cache."""
        pairs = _halves(keys)
        if not len(self):
            return np.full(len(pairs), -1, np.int64)
        places = np.searchsorted(self._first, pairs[:, 0]).clip(max=len(self) - 1)
        there = (self._first[places] == pairs[:, 0]) & (self._second[places] == pairs[:, 1])
        return np.where(there, places, -1)

    def read(self, places: NDArray[np.int64], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the arrays of the rows at ``places``, concatenated: name -> [N, ...], copied out of the files.

        With two tokenizers, arrays of the teachers have M tokens. A shard has the arrays of one pair of teachers, and
        so must the rows.
        """
        return {name: self._read(places, name) for name in names}

    def _read(self, places: NDArray[np.int64], name: str) -> NDArray[Any]:
        is_other = OTHER_OFFSETS in self._bounds and name not in OWN_ROLES
        bounds = self._bounds[OTHER_OFFSETS if is_other else OFFSETS][places]
        where = zip(self._shard[places].tolist(), bounds.tolist(), strict=True)
        # An empty piece first: concatenate needs at least one, and rows without a valid token give none.
        none = next(arrays[name][:0] for arrays in self._shards if name in arrays)
        return np.concatenate([none, *(self._shards[shard][name][start:stop] for shard, (start, stop) in where)])


def _halves(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
