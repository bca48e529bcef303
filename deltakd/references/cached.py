"""References that were run once and are now read from disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from deltakd.kernels import Buckets
from deltakd.references.index import RowIndex, keys_of_batch
from deltakd.references.store import SUPPORT, CacheStore, StoreError, as_tensor
from deltakd.types import Batch, Head

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@final
class CachedReferences:
    """Reads the references for each batch's rows from a cache.

    Args:
        store: the cache, already verified (``CacheStore.check``).
        roles: the roles to serve; the cache may hold more.
    """

    def __init__(self, store: CacheStore, roles: Collection[str]) -> None:
        content: dict[str, Any] = store.manifest.content
        #: The inputs that determine the cached numbers (``deltakd.references.content``).
        self.content = content
        self._models: dict[str, dict[str, Any]] = {role: content["models"][role] for role in sorted(roles)}
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
        return frozenset(self._models)

    @property
    def index(self) -> RowIndex:
        """The index of cached rows."""
        return self._index

    def to(self, device: torch.device) -> None:
        """Return heads on ``device`` from now on."""
        self._device = device
        self._heads = {name: tensor.to(device) for name, tensor in self._heads.items()}

    def empty_heads(self) -> dict[str, Head]:
        """Return role -> head over no tokens; none if the cache holds log-probs."""
        if self._is_topk:
            return {}
        widths = {role: self._heads[f"{role}.weight"].shape[1] for role in self._models}
        return {role: self._head(role, torch.empty(0, width)) for role, width in widths.items()}

    def start(self, batch: Batch) -> Callable[[], dict[str, Head] | Buckets]:
        """Look up the rows now, unless they were read ahead; the returned function reads them.

        Raises:
            StoreError: a row is not in the cache.
        """
        if batch.cached is not None:
            read = batch.cached
            return lambda: self._served(read)
        places = self._places(batch)
        return lambda: self._served(self._read(places))

    def read_ahead(self, batch: Batch) -> Batch:
        """Return a batch on the CPU with what the cache holds for it, for ``start`` once the batch has moved.

        May run in a thread while another batch is trained on.

        Raises:
            StoreError: a row is not in the cache.
        """
        return replace(batch, cached=self._read(self._places(batch)))

    def __call__(self, batch: Batch) -> dict[str, Head] | Buckets:
        """Return role -> head of the valid tokens of ``batch.stream_of(role)``, or their buckets.

        Raises:
            StoreError: a row is not in the cache.
        """
        return self._served(self._read(self._places(batch)))

    def _places(self, batch: Batch) -> NDArray[np.int64]:
        places = self._index.find(keys_of_batch(batch))
        if (places < 0).any():
            raise StoreError(
                f"{int((places < 0).sum())} of the {len(places)} rows {batch.row_ids.tolist()} are not in the cache "
                f"reference.path={self._path}; add them with deltakd.cache"
            )
        return places

    def _read(self, places: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Return the arrays of rows by name, on the CPU."""
        arrays = self._index.read(places, [*self._models, *([SUPPORT] if self._is_topk else [])])
        support = {SUPPORT: torch.from_numpy(arrays.pop(SUPPORT).astype("int64"))} if self._is_topk else {}
        return support | {
            role: as_tensor(arrays[role], DTYPES[model["stored_dtype"]]) for role, model in self._models.items()
        }

    def _served(self, read: Mapping[str, torch.Tensor]) -> dict[str, Head] | Buckets:
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in read.items()}
        tokens = {role: moved[role] for role in self._models}
        if self._is_topk:
            return Buckets(moved[SUPPORT], tokens, self._temperature)
        return {role: self._head(role, hidden) for role, hidden in tokens.items()}

    def _head(self, role: str, hidden: torch.Tensor) -> Head:
        model = self._models[role]
        return Head(
            hidden, self._heads[f"{role}.weight"], self._heads.get(f"{role}.bias"), model["softcap"], model["scale"]
        )
