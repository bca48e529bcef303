"""Memory for logits: blocks of rows that stay in cache, and buffers that the next chunk overwrites."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from torch import Tensor

from deltakd.types import Head
from deltakd.types.heads import aligned_rows

#: Bytes of logits in a block of rows: on a CPU a few blocks fit in a core's cache; on other devices one block keeps the
#: device busy.
BLOCK_BYTES = {"cpu": 2**20}
BLOCK_BYTES_ELSEWHERE = 2**24


def row_blocks(z_NV: Tensor) -> Iterator[slice]:
    """Yield slices of rows that together cover [n, V]; one empty slice if there are no rows."""
    size = max(1, BLOCK_BYTES.get(z_NV.device.type, BLOCK_BYTES_ELSEWHERE) // (z_NV.shape[1] * z_NV.itemsize))
    for start in range(0, max(1, len(z_NV)), size):
        yield slice(start, min(start + size, len(z_NV)))


@final
class ChunkBuffers:
    """Tensors of logits that one chunk leaves to the next, and on a CPU one step to the next.

    On a CPU, large tensors are pages that the system maps for each and fills with zeros: a tenth of the time of a loss.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor | None] = {}

    def logits(self, name: str, head: Head) -> Tensor:
        """Return a tensor for the logits of a head, [n, V], holding anything; the same memory for the same name."""
        rows, columns = len(head), head.weight.shape[0]
        kept = self._kept.get(name)
        if kept is None or not _fits(kept, head):
            # The old one is freed first.
            kept = self._kept[name] = None
            kept = self._kept[name] = aligned_rows(rows, columns, head.hidden.new_empty(0, dtype=head.dtype))
        return kept[:rows]


def _fits(kept: Tensor, head: Head) -> bool:
    alike = (kept.shape[1], kept.dtype, kept.device) == (head.weight.shape[0], head.dtype, head.hidden.device)
    return alike and len(kept) >= len(head)
