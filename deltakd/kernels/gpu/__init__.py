"""Triton kernels for what is not a matrix product, on NVIDIA GPUs (docs/scaling.md#gpu).

The docstring of each module gives the two numbers that bound its time: the bytes that it must move and the operations
that it must do.
"""

from __future__ import annotations

import torch

from deltakd.types.triton_devices import run_triton


def serves(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Return whether the kernels run on a device, for logits of these types; they compute in float32."""
    return set(dtypes) <= {torch.float32} and run_triton(device)
