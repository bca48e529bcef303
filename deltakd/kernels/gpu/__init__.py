"""Triton kernels for what is not a matrix product, on NVIDIA GPUs (docs/scaling.md#gpu).

The docstring of each module gives the two numbers that bound its time: the bytes that it must move and the operations
that it must do. Modules that hold kernels import Triton, and are imported when first needed.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

#: Types of devices that run the kernels. Triton's interpreter runs them on a CPU, for tests.
DEVICES = frozenset({"cuda"})


def serves(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Return whether the kernels run on a device, for logits of these types; they compute in float32."""
    return device.type in DEVICES and set(dtypes) <= {torch.float32} and _has_triton()


@functools.cache
def _has_triton() -> bool:
    # On ROCm the kernels have not been tried.
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None
