"""Where Triton kernels run. The modules that hold them import Triton, and are imported when first needed."""

from __future__ import annotations

import functools
import importlib.util

import torch

#: Types of devices that run the kernels. Triton's interpreter runs them on a CPU, for tests.
DEVICES = frozenset({"cuda"})


def run_triton(device: torch.device) -> bool:
    """Return whether Triton kernels run on a device: an NVIDIA GPU, with Triton installed."""
    return device.type in DEVICES and _has_triton()


@functools.cache
def _has_triton() -> bool:
    # On ROCm the kernels have not been tried.
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None
