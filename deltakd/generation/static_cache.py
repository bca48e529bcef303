"""A key-value cache whose tensors keep their size and place, and the decoding step over it as one CUDA graph.

At each step a model launches hundreds of small kernels, which on a GPU takes longer than to run them. A CUDA graph
launches them all at once, but replays them on the same memory. So the cache has all its columns from the start, a step
writes into one of them, and a mask hides the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

#: Columns are a multiple of this: fused attention reads masks whose rows are aligned.
COLUMNS = 64
#: Steps before a graph is captured, in which libraries choose their algorithms and allocate.
_WARM_UP = 2


def keys_device(cache: Any) -> torch.device:
    """Return where an ordinary cache has its keys."""
    found: torch.device = next(layer.keys.device for layer in cache.layers if layer.is_initialized)
    return found


@final
class StaticLayer(DynamicLayer):
    """Keys and values of full attention, in a place of their own.

    Args:
        like: the layer of an ordinary cache, for sizes, dtype and device.
        rows, columns: of the new tensors.
        column: [1] int64, where ``update`` writes.
    """

    def __init__(self, like: DynamicLayer, rows: int, columns: int, column: Tensor) -> None:
        super().__init__()
        assert like.keys is not None
        assert like.values is not None
        self.lazy_initialization(like.keys, like.values)
        # Zeros, not anything: what is masked must be finite.
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], columns, states.shape[3]) for states in (like.keys, like.values)
        )
        self._column = column

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, heads, 1, D] into the current column; return all columns."""
        keys, values = self.buffers
        return keys.index_copy_(2, self._column, key_states), values.index_copy_(2, self._column, value_states)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [B, heads, L, D]."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values


@final
class StaticKeyValues(Cache):
    """A cache of B rows and L columns, of which ``start`` to ``end`` are in use.

    Args:
        like: an ordinary cache, whose layers are all full attention; nothing of its content is taken.
        rows: B.
        columns: L.
    """

    def __init__(self, like: Any, rows: int, columns: int) -> None:
        device = keys_device(like)
        #: [1] int64: the column that the next step writes.
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        # A layer that shares another layer's keys has none of its own.
        super().__init__([StaticLayer(x, rows, columns, self.column) if x.is_initialized else x for x in like.layers])
        self.rows, self.columns = rows, columns
        self.start = self.end = 0

    @property
    def _own(self) -> list[StaticLayer]:
        return [layer for layer in self.layers if isinstance(layer, StaticLayer)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns in use."""
        return self.end - self.start

    def advance(self) -> None:
        """Count the column that a step has written."""
        self.end += 1

    def adopt(self, cache: Any) -> None:
        """Hold the rows of an ordinary cache, and nothing else."""
        self.start, self.end = 0, cache.get_seq_length()
        for ours, theirs in zip(self.layers, cache.layers, strict=True):
            if isinstance(ours, StaticLayer):
                for states, found in zip(ours.buffers, (theirs.keys, theirs.values), strict=True):
                    states[: len(found), :, : self.end] = found

    def select(self, keep: Sequence[int], columns: int) -> None:
        """As ``key_values.select``; afterwards there is room for another column, if columns are to spare."""
        assert len(keep) <= self.rows
        assert columns <= self.columns
        if list(keep) != list(range(len(keep))):
            rows = torch.tensor(keep, device=self.column.device)
            for layer in self._own:
                for states in layer.buffers:
                    states[: len(keep)] = states[rows]
        used = min(columns, self.end - self.start)
        # New columns on the left may hold anything finite: they are masked.
        if self.end < columns:
            self._move(used, columns)
        elif self.end == self.columns:
            self._move(used, max(columns, used))
        self.start = self.end - columns

    def _move(self, used: int, end: int) -> None:
        """Let the last ``used`` columns end at another one."""
        if end == self.end:
            return
        for layer in self._own:
            for states in layer.buffers:
                states[:, :, end - used : end] = states[:, :, self.end - used : self.end].clone()
        self.end = end

    def replace(self, rows: Tensor, cache: Any, columns: int) -> None:
        """As ``key_values.replace``."""
        self.start = self.end - columns
        for ours, theirs in zip(self.layers, cache.layers, strict=True):
            if isinstance(ours, StaticLayer):
                for states, found in zip(ours.buffers, (theirs.keys, theirs.values), strict=True):
                    states[rows, :, self.start : self.end] = pad(found, (0, 0, columns - found.shape[2], 0))

    def as_ordinary(self, rows: int) -> Cache:
        """Return a copy of the first rows as an ordinary cache."""
        layers: list[Any] = []
        for layer in self.layers:
            if isinstance(layer, StaticLayer):
                keys, values = (states[:rows, :, self.start : self.end].clone() for states in layer.buffers)
                layer = DynamicLayer()
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
            layers.append(layer)
        return Cache(layers)


@final
class StaticStep:
    """One forward pass of a model over a ``StaticKeyValues``; on a CUDA device it is captured and replayed.

    Args:
        model: a transformers decoder, possibly wrapped by PEFT.
        cache: the cache; the graph belongs to it.
        takes: the names of the arguments of the model's ``forward``.
        additive: the model's attention adds its mask to the scores; False: it takes true and false.
    """

    def __init__(self, model: nn.Module, cache: StaticKeyValues, takes: frozenset[str], additive: bool) -> None:
        device = cache.column.device
        self._model = model
        self._cache = cache
        self._ids_B1 = torch.zeros(cache.rows, 1, dtype=torch.int64, device=device)
        self._positions_B1 = torch.zeros_like(self._ids_B1)
        self._visible_BL = torch.zeros(cache.rows, cache.columns, dtype=torch.bool, device=device)
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._additive = additive
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_BV = torch.empty(0)

    def __call__(self, input_ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return the logits, [b, V] in the model's dtype, which the next step overwrites; advance the cache.

        Args:
            input_ids, positions: [b, 1], b ≤ B.
            mask: [b, T] over the columns in use and the new one.
        """
        cache, rows = self._cache, len(input_ids)
        end = cache.end + 1
        assert end <= cache.columns
        assert mask.shape[1] == end - cache.start
        self._ids_B1[:rows] = input_ids
        self._positions_B1[:rows] = positions
        self._visible_BL.zero_()
        self._visible_BL[:rows, cache.start : end] = mask.bool()
        # A row that sees nothing would be NaN.
        self._visible_BL[:, cache.end] = True
        cache.column.fill_(cache.end)
        if cache.column.is_cuda:
            self._replay()
        else:
            self._logits_BV = self._forward()
        cache.advance()
        return self._logits_BV[:rows]

    def _replay(self) -> None:
        with torch.cuda.device(self._cache.column.device):
            if self._graph is None:
                self._capture()
            assert self._graph is not None
            self._graph.replay()

    def _capture(self) -> None:
        # On a stream of its own, as capturing demands. Each warm-up writes the same column again.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The thread that makes batches ahead may lock memory meanwhile, which would end a capture of all threads.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits_BV = self._forward()
        self._graph = graph

    def _forward(self) -> Tensor:
        mask = self._visible_BL[:, None, None]
        if self._additive:
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        output = self._model(
            input_ids=self._ids_B1,
            attention_mask=mask,
            position_ids=self._positions_B1,
            past_key_values=self._cache,
            use_cache=True,
            **self._options,
        )
        logits: Tensor = output.logits[:, -1]
        return logits
