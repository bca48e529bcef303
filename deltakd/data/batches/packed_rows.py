"""Lays the rows of a micro-batch end to end (``data.packing``).

Plain text is cut into blocks elsewhere, once for the whole set: ``data/encoding/packing.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from deltakd.types import Batch, PackedRows, TokenStream

S = TypeVar("S", bound=TokenStream)

#: Positions of a sequence, unless a row is longer. Attention with a mask costs as many products for each position as a
#: sequence has; in sequences of this length that is still little beside the other layers.
SEQUENCE_LENGTH = 1024


def pack_rows(batch: S, length: int = SEQUENCE_LENGTH) -> S:
    """Return the batch with its rows packed into sequences; all else stays, in the rows' order.

    Args:
        batch: on the CPU. The rows of each of its routes are packed alone: each pair of teachers runs its own.
        length: positions of a sequence, unless a row is longer.
    """
    if isinstance(batch, Batch):
        batch.routes = tuple(replace(route, stream=pack_rows(route.stream, length)) for route in batch.routes)
    lengths = batch.attention_mask.sum(1).numpy()
    places = place_rows(lengths.tolist(), max(length, int(lengths.max())))
    width = int(max(start + lengths[row] for row, (_, start) in enumerate(places)))
    sequences = 1 + max(sequence for sequence, _ in places)
    input_ids = np.full((sequences, width), int(batch.input_ids[0, 0]), np.int64)
    position_ids = np.empty((sequences, width), np.int64)
    ends = np.zeros(sequences, np.int64)
    for row, (sequence, start) in enumerate(places):
        stop = start + int(lengths[row])
        input_ids[sequence, start:stop] = batch.input_ids[row, : lengths[row]].numpy()
        position_ids[sequence, start:stop] = np.arange(lengths[row])
        ends[sequence] = max(ends[sequence], stop)
    for sequence, end in enumerate(ends):
        position_ids[sequence, end:] = np.arange(width - end) % int(lengths.max())
    firsts = np.array([sequence * width + start for sequence, start in places])
    row_N, position_N = np.divmod(batch.valid_N.numpy(), batch.labels.shape[1])
    starts = _starts(position_ids)
    batch.packed = PackedRows(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(firsts[row_N] + position_N),
        torch.from_numpy(starts),
        int(np.diff(starts).max()),
    )
    return batch


def place_rows(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """Return (sequence, first position) of each row: the longest first, each into the first sequence with room."""
    room: list[int] = []
    places = [(0, 0)] * len(lengths)
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        sequence = next((s for s, free in enumerate(room) if free >= lengths[row]), len(room))
        if sequence == len(room):
            room.append(capacity)
        places[row] = (sequence, capacity - room[sequence])
        room[sequence] -= lengths[row]
    return places


def _starts(position_ids: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return where rows start in the flattened sequences, and their end."""
    return np.append(np.flatnonzero(position_ids.ravel() == 0), position_ids.size).astype(np.int32)
