"""Rows of a cache, looked up by content: order, batch size and number of ranks do not matter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from deltakd.data import EncodedSet
from deltakd.references.store import OFFSETS, ROW_KEYS, CacheStore, StoreError, map_arrays
from deltakd.types import Batch

#: Bytes per row key.
KEY_BYTES = 16


def row_key(input_ids: NDArray[Any], labels: NDArray[Any]) -> bytes:
    """Return a 128-bit hash of a row's T token ids and labels, without padding."""
    digest = hashlib.blake2b(input_ids.astype("<i4", copy=False).tobytes(), digest_size=KEY_BYTES)
    digest.update(labels.astype("<i4", copy=False).tobytes())
    return digest.digest()


def keys_of_set(encoded: EncodedSet) -> NDArray[np.uint8]:
    """Return [n, 16], the keys of all rows of a set."""
    bounds = encoded.offsets.tolist()
    return as_keys(row_key(encoded.input_ids[a:b], encoded.labels[a:b]) for a, b in pairwise(bounds))


def keys_of_batch(batch: Batch) -> NDArray[np.uint8]:
    """Return [r, 16], the keys of the batch's rows that have a valid token, in order."""
    labelled = batch.valid_BT.any(1).cpu().numpy()
    lengths = batch.attention_mask.sum(1).cpu().numpy()
    ids_BT, labels_BT = batch.input_ids.cpu().numpy(), batch.labels.cpu().numpy()
    return as_keys(
        row_key(ids_BT[row, :length], labels_BT[row, :length]) for row, length in enumerate(lengths) if labelled[row]
    )


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
        offsets = [np.array(arrays[OFFSETS]) for arrays in self._shards]
        pairs = _halves(np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *keys]))
        order = np.argsort(pairs[:, 0], kind="stable")
        #: The keys' first halves in ascending order, and the second halves with them.
        self._first, self._second = pairs[order, 0], pairs[order, 1]
        if (self._first[1:] == self._first[:-1]).any():
            raise StoreError(f"reference.path={store.path} holds a row twice; remove it and make the cache again")
        none = np.empty(0, np.int64)
        shard_of = [np.full(len(found), number, np.int64) for number, found in enumerate(keys)]
        self._shard = np.concatenate([none, *shard_of])[order]
        self._start = np.concatenate([none, *(bounds[:-1] for bounds in offsets)])[order]
        self._stop = np.concatenate([none, *(bounds[1:] for bounds in offsets)])[order]

    def __len__(self) -> int:
        return len(self._first)

    def find(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return [n], the positions of the rows with keys [n, 16]; −1 for a row that is not in the cache."""
        pairs = _halves(keys)
        if not len(self):
            return np.full(len(pairs), -1, np.int64)
        places = np.searchsorted(self._first, pairs[:, 0]).clip(max=len(self) - 1)
        there = (self._first[places] == pairs[:, 0]) & (self._second[places] == pairs[:, 1])
        return np.where(there, places, -1)

    def read(self, places: NDArray[np.int64], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the arrays of the rows at ``places``, concatenated: name -> [N, ...], copied out of the files."""
        where = zip(self._shard[places], self._start[places], self._stop[places], strict=True)
        spans = [(int(shard), slice(int(start), int(stop))) for shard, start, stop in where]
        # An empty piece first: concatenate needs at least one, and rows without a valid token give none.
        return {
            name: np.concatenate(
                [self._shards[0][name][:0], *(self._shards[shard][name][span] for shard, span in spans)]
            )
            for name in names
        }


def _halves(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
