"""Rows of a micro-batch laid end to end, so that a model computes no padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PackedRows:
    """Several rows to a sequence: S sequences of L positions. No token attends to another row's.

    Args:
        input_ids: [S, L] int64.
        position_ids: [S, L] int64: 0, 1, ... within each row; padding at a sequence's end counts as rows.
        valid: [N] int64: indices into the flattened [S, L] where the valid tokens are predicted, in the rows' order.
        starts: [R + 1] int32: where rows start in the flattened [S, L], and its end.
        longest: positions of the longest row.
    """

    input_ids: Tensor
    position_ids: Tensor
    valid: Tensor
    starts: Tensor
    longest: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRows:
        """Return the sequences with their tensors on ``device``."""
        return PackedRows(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.position_ids.to(device, non_blocking=non_blocking),
            self.valid.to(device, non_blocking=non_blocking),
            self.starts.to(device, non_blocking=non_blocking),
            self.longest,
        )
