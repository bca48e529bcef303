"""Edits a model's key-value cache: selects, repeats and replaces rows, and adds columns without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from deltakd.generation.static_cache import COLUMNS, StaticKeyValues, keys_device

#: Spare columns of a new buffer: the cache is copied only once per this many steps.
ROOM = 32


@final
class RoomyLayer(DynamicLayer):
    """Keys and values of full attention, in buffers with spare columns.

    The transformers layer copies everything at every step, which costs a small model as much as its attention.

    Args:
        keys, values: [B, heads, T, D]; copied.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers = tuple(pad(states, (0, 0, 0, ROOM)) for states in (keys, values))
        self._show(0, keys.shape[2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, heads, t, D]; return views of all keys and values."""
        end = self._end + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            extra = key_states.shape[2] + ROOM
            self._buffers = tuple(pad(states, (0, 0, 0, extra)) for states in self._shown)
            end -= self._start
            self._show(0, end - key_states.shape[2])
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._end : end] = states
        self._show(self._start, end)
        return self._shown

    @property
    def _shown(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def narrow(self, columns: int) -> None:
        """Forget all but the last columns."""
        self._show(self._end - columns, self._end)

    def _show(self, start: int, end: int) -> None:
        self._start, self._end = start, end
        self.keys, self.values = (buffer[:, :, start:end] for buffer in self._buffers)


@final
class JointCache:
    """The caches of several models that decode the same rows; a model's own may be on another device.

    Args:
        parts: one cache per model, all with the same columns.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts

    def get_seq_length(self) -> int:
        """Return the number of columns."""
        length: int = self.parts[0].get_seq_length()
        return length


def _parts(cache: Any) -> Sequence[Any]:
    """Return the caches, one per model."""
    return cache.parts if isinstance(cache, JointCache) else [cache]


def can_select(cache: Any) -> bool:
    """True if ``select`` and ``replace`` work on a cache: all its layers are plain or sliding attention.

    The check is by exact type. Layers with a recurrent state inherit the methods of attention layers, which would move
    the keys and leave the state behind; other layers hold more than keys and values, or hold them quantised.
    """
    known = (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer)
    layers = [getattr(part, "layers", []) for part in _parts(cache)]
    return is_static(cache) or all(own and all(type(layer) in known for layer in own) for own in layers)


def is_static(cache: Any) -> bool:
    """True if a cache keeps its tensors as they are."""
    return any(isinstance(part, StaticKeyValues) for part in _parts(cache))


def static_like(cache: Any, rows: int, columns: int) -> Any:
    """Return a static cache for the same models.

    Args:
        cache: one that ``can_select``.
        rows: most rows.
        columns: most columns in use at once.

    Raises:
        ValueError: a model has sliding windows.
    """
    parts = _parts(cache)
    if any(type(layer) is DynamicSlidingWindowLayer for part in parts for layer in part.layers):
        raise ValueError("it has layers with a sliding window")
    wide = -(-columns // COLUMNS) * COLUMNS
    made = [StaticKeyValues(part, rows, wide) for part in parts]
    return JointCache(made) if isinstance(cache, JointCache) else made[0]


def adopt(static: Any, cache: Any) -> None:
    """Let a static cache hold the rows of an ordinary one, and nothing else."""
    for part, other in zip(_parts(static), _parts(cache), strict=True):
        part.adopt(other)


def is_full(cache: Any) -> bool:
    """True if a cache has no room for another column where it stands."""
    return is_static(cache) and any(part.end == part.columns for part in _parts(cache))


def select(cache: Any, keep: Sequence[int], columns: int) -> None:
    """Keep some rows, and add or remove columns on the left.

    Args:
        cache: one that ``can_select``; its full-attention layers become ``RoomyLayer``.
        keep: the rows; may repeat.
        columns: number of columns afterwards; new ones are to be masked.
    """
    for part in _parts(cache):
        if isinstance(part, StaticKeyValues):
            part.select(keep, columns)
            continue
        rows = torch.tensor(keep, device=keys_device(part))
        for number, layer in enumerate(part.layers):
            # A layer that shares another layer's keys has none of its own.
            if layer.is_initialized:
                part.layers[number] = _selected(layer, rows.to(layer.keys.device), columns)


def _selected(layer: Any, rows: Tensor, columns: int) -> Any:
    width = _width(layer, columns)
    keys, values = (_aligned(states, width)[rows] for states in (layer.keys, layer.values))
    if type(layer) is not DynamicSlidingWindowLayer:
        return RoomyLayer(keys, values)
    # It holds only the last columns but counts all of them, since the mask is built from the count.
    layer.keys, layer.values, layer.cumulative_length = keys, values, columns
    return layer


def replace(cache: Any, rows: Tensor, other: Any, columns: int) -> None:
    """Replace ``rows`` of this cache by all rows of another, in order, with their last columns aligned.

    Args:
        cache: one that went through ``select``.
        rows: [n] int64, distinct.
        other: a cache of n rows and at most ``columns`` columns.
        columns: number of this cache's columns to keep.
    """
    for part, theirs in zip(_parts(cache), _parts(other), strict=True):
        if isinstance(part, StaticKeyValues):
            part.replace(rows.to(part.column.device), theirs, columns)
            continue
        for layer, new in zip(part.layers, theirs.layers, strict=True):
            if layer.is_initialized:
                _replace(layer, rows.to(layer.keys.device), new, columns)


def _replace(layer: Any, rows: Tensor, new: Any, columns: int) -> None:
    if isinstance(layer, RoomyLayer):
        layer.narrow(columns)
    else:
        width = _width(layer, columns)
        layer.keys, layer.values = (states[:, :, -width:] for states in (layer.keys, layer.values))
        layer.cumulative_length = columns
    for states, found in ((layer.keys, new.keys), (layer.values, new.values)):
        states[rows] = _aligned(found, states.shape[2])


def _width(layer: Any, columns: int) -> int:
    """Return how many of ``columns`` columns a layer holds."""
    return min(columns, layer.sliding_window - 1) if type(layer) is DynamicSlidingWindowLayer else columns


def _aligned(states_BHTD: Tensor, width: int) -> Tensor:
    missing = width - states_BHTD.shape[2]
    return pad(states_BHTD, (0, 0, missing, 0)) if missing > 0 else states_BHTD[:, :, -missing:]
