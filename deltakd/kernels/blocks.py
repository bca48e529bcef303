"""Elementwise work over logits, a few rows at a time: a whole chunk would go through memory at every pass."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

#: Bytes of logits in a block of rows: two of a core's cache on a CPU; elsewhere what keeps the device busy.
BLOCK_BYTES = {"cpu": 2**21}
BLOCK_BYTES_ELSEWHERE = 2**24


def row_blocks(z_NV: Tensor) -> Iterator[slice]:
    """Slices of rows that together are all of [n, V]; one empty slice where there are none."""
    size = max(1, BLOCK_BYTES.get(z_NV.device.type, BLOCK_BYTES_ELSEWHERE) // (z_NV.shape[1] * z_NV.itemsize))
    for start in range(0, max(1, len(z_NV)), size):
        yield slice(start, min(start + size, len(z_NV)))
