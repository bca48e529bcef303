"""Where the tensors of an answer lie in one piece of memory: shared, a GPU's, or received from a group of two."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

#: Tensors start at multiples of so many bytes.
_ALIGNMENT = 64


def layout(described: Mapping[str, tuple[torch.dtype, list[int]]]) -> tuple[dict[str, int], int]:
    """Return where each tensor starts in a region, and how many bytes all of them take."""
    starts, end = {}, 0
    for name, (dtype, shape) in described.items():
        starts[name] = end
        end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def views(
    whole: Tensor, described: Mapping[str, tuple[torch.dtype, list[int]]], starts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the tensors that lie in [bytes] uint8 memory, as ``layout`` has it; those without elements lie nowhere."""
    found = {}
    for name, (dtype, shape) in described.items():
        size = math.prod(shape) * dtype.itemsize
        # PyTorch views no empty memory of NumPy's as another dtype.
        part = whole[starts[name] : starts[name] + size].view(dtype) if size else torch.empty(0, dtype=dtype)
        found[name] = part.reshape(shape)
    return found
