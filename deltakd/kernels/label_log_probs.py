"""Log-probs of given tokens, one chunk of logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from deltakd.kernels.options import MEMORY_BUDGET, chunk_size_for
from deltakd.types import Head


@torch.no_grad()
def label_log_probs(head: Head, labels: Tensor, memory_budget: float = MEMORY_BUDGET) -> Tensor:
    """Return log softmax(logits)[label], [N] in at least float32, detached.

    Args:
        head: over N tokens.
        labels: [N] int64.
        memory_budget: MiB for the logits of a chunk.
    """
    itemsize = torch.promote_types(head.weight.dtype, torch.float32).itemsize
    size = chunk_size_for(memory_budget, head.weight.shape[0], itemsize, "fused")
    head = head.prepared()
    pieces = [
        head.rows(start, start + size).logits().log_softmax(-1).gather(1, labels[start : start + size, None])
        for start in range(0, max(1, len(labels)), size)
    ]
    return torch.cat(pieces).squeeze(1)
