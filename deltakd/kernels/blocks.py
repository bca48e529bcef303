"""Blocks of rows for elementwise work on logits, so that each operation stays in cache, not in main memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

#: Bytes of logits in a block of rows: on a CPU two blocks fit in a core's cache; on other devices one block keeps the
#: device busy.
BLOCK_BYTES = {"cpu": 2**21}
BLOCK_BYTES_ELSEWHERE = 2**24


def row_blocks(z_NV: Tensor) -> Iterator[slice]:
    """Yield slices of rows that together cover [n, V]; one empty slice if there are no rows."""
    size = max(1, BLOCK_BYTES.get(z_NV.device.type, BLOCK_BYTES_ELSEWHERE) // (z_NV.shape[1] * z_NV.itemsize))
    for start in range(0, max(1, len(z_NV)), size):
        yield slice(start, min(start + size, len(z_NV)))
