"""References that were run once and are now read from disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from deltakd.kernels import Buckets
from deltakd.references.base import RoutedHeads
from deltakd.references.index import RowIndex, keys_of_batch, pairs_of_batch
from deltakd.references.routed import names_of_pair, routed_roles
from deltakd.references.store import SUPPORT, CacheStore, StoreError, as_tensor
from deltakd.types import Batch, Head

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@final
class CachedReferences:
    """Reads the references for each batch's rows from a cache.

    In a cache of routed rows (``model.routes``), ``teacher`` and ``teacher_raw`` are another pair for each task.

    Args:
        store: the cache, already verified (``CacheStore.check``).
        roles: the roles to serve, those of the first pair if rows are routed; the cache may hold more.
    """

    def __init__(self, store: CacheStore, roles: Collection[str]) -> None:
        content: dict[str, Any] = store.manifest.content
        #: The inputs that determine the cached numbers (``deltakd.references.content``).
        self.content = content
        self._roles = frozenset(roles)
        #: The pairs that judge rows; empty: rows are not routed.
        self._pairs = sorted(set((content.get("routes") or {}).values()))
        held = routed_roles(roles, self._pairs) if self._pairs else roles
        self._models: dict[str, dict[str, Any]] = {role: content["models"][role] for role in sorted(held)}
        self._path = store.path
        #: Number of tokens shared by the cached models; every head is cut to it.
        self.vocabulary: int = content["vocabulary"]
        #: The same of the cached teachers, if they have a tokenizer of their own; else None.
        self.other_vocabulary: int | None = content["other"]["vocabulary"] if content.get("other") else None
        self._is_topk = content["store"] == "topk"
        self._temperature = float(content["temperature"] or 1.0)
        self._index = RowIndex(store)
        self._device = torch.device("cpu")
        self._heads = {name: t for name, t in store.read_heads().items() if name.partition(".")[0] in self._models}

    @property
    def roles(self) -> frozenset[str]:
        return self._roles

    @property
    def index(self) -> RowIndex:
        """The index of cached rows."""
        return self._index

    def to(self, device: torch.device) -> None:
        """Return heads on ``device`` from now on."""
        self._device = device
        self._heads = {name: tensor.to(device) for name, tensor in self._heads.items()}

    def empty_heads(self) -> dict[str, Head]:
        """Return role -> head over no tokens, of the first pair if rows are routed; none if it holds log-probs."""
        if self._is_topk:
            return {}
        names = self._names(self._pairs[0] if self._pairs else None)
        widths = {read: self._heads[f"{role}.weight"].shape[1] for read, role in names.items()}
        return {read: self._head(names[read], torch.empty(0, width)) for read, width in widths.items()}

    def start(self, batch: Batch) -> Callable[[], dict[str, Head] | Buckets | RoutedHeads]:
        """Look up the rows now, unless they were read ahead; the returned function reads them.

        Raises:
            StoreError: a row is not in the cache.
        """
        if batch.cached is not None:
            read = batch.cached
            return lambda: self._served(batch, read)
        places = self._places(batch)
        return lambda: self._served(batch, self._read(batch, places))

    def read_ahead(self, batch: Batch) -> Batch:
        """Return a batch on the CPU with what the cache holds for it, for ``start`` once the batch has moved.

        May run in a thread while another batch is trained on.

        Raises:
            StoreError: a row is not in the cache.
        """
        return replace(batch, cached=self._read(batch, self._places(batch)))

    def __call__(self, batch: Batch) -> dict[str, Head] | Buckets | RoutedHeads:
        """Return role -> head of the valid tokens of ``batch.stream_of(role)``, or their buckets; in parts if routed.

        Raises:
            StoreError: a row is not in the cache.
        """
        return self._served(batch, self._read(batch, self._places(batch)))

    def _names(self, pair: int | None) -> dict[str, str]:
        """Return role to serve -> role in the cache."""
        return {role: role for role in sorted(self._roles)} if pair is None else names_of_pair(self._roles, pair)

    def _places(self, batch: Batch) -> NDArray[np.int64]:
        places = self._index.find(keys_of_batch(batch))
        if (places < 0).any():
            raise StoreError(
                f"{int((places < 0).sum())} of the {len(places)} rows {batch.row_ids.tolist()} are not in the cache "
                f"reference.path={self._path}; add them with deltakd.cache"
            )
        return places

    def _read(self, batch: Batch, places: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Return the arrays of rows by name, on the CPU; if rows are routed, those of each pair apart."""
        if not self._pairs:
            return self._read_of(places, None)
        pair_of_row = np.array([*pairs_of_batch(batch).values()], np.int64)
        return {
            _key(pair, name): tensor
            for _, pair in self._parts(batch)
            for name, tensor in self._read_of(places[pair_of_row == pair], pair).items()
        }

    def _read_of(self, places: NDArray[np.int64], pair: int | None) -> dict[str, torch.Tensor]:
        names = self._names(pair)
        arrays = self._index.read(places, [*names.values(), *([SUPPORT] if self._is_topk else [])])
        support = {SUPPORT: torch.from_numpy(arrays.pop(SUPPORT).astype("int64"))} if self._is_topk else {}
        return support | {
            read: as_tensor(arrays[role], DTYPES[self._models[role]["stored_dtype"]]) for read, role in names.items()
        }

    def _parts(self, batch: Batch) -> list[tuple[torch.Tensor, int]]:
        """Return the tokens of each pair that has some; of a batch without a valid token, an empty part."""
        found = [(route.tokens, route.pair) for route in batch.routes if len(route.tokens)]
        if found:
            return found
        # Any pair will do, of those whose arrays the cache has.
        held = next(pair for pair in self._pairs if all(map(self._index.holds, self._names(pair).values())))
        return [(batch.valid_N, held)]

    def _served(self, batch: Batch, read: Mapping[str, torch.Tensor]) -> dict[str, Head] | Buckets | RoutedHeads:
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in read.items()}
        if not self._pairs:
            return self._heads_of(moved, None)
        return RoutedHeads(
            tuple(
                (tokens, self._heads_of({name: moved[_key(pair, name)] for name in self._arrays}, pair))
                for tokens, pair in self._parts(batch)
            )
        )

    @property
    def _arrays(self) -> list[str]:
        return [*sorted(self._roles), *([SUPPORT] if self._is_topk else [])]

    def _heads_of(self, arrays: Mapping[str, torch.Tensor], pair: int | None) -> dict[str, Head] | Buckets:
        names = self._names(pair)
        if self._is_topk:
            return Buckets(arrays[SUPPORT], {read: arrays[read] for read in names}, self._temperature)
        return {read: self._head(role, arrays[read]) for read, role in names.items()}

    def _head(self, role: str, hidden: torch.Tensor) -> Head:
        model = self._models[role]
        return Head(
            hidden, self._heads[f"{role}.weight"], self._heads.get(f"{role}.bias"), model["softcap"], model["scale"]
        )


def _key(pair: int, name: str) -> str:
    """Return the name of a pair's array among those of a batch."""
    return f"{name} of pair {pair}"
