"""Linear layers that multiply a repacked copy of their weight while a model generates on a CPU.

For a few rows a product is bound by reading the weight, and MKL reads a row-major one slowly: 8 rows times a head of
[50257, 128] take 5.3 ms, and 2.3 ms in oneDNN's own layout; at [49152, 576] it is 19 and 8 ms (one core of an AMD
EPYC). Repacking takes about as long as four products.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard, final

import torch
from torch import Tensor, nn

#: Layers with fewer weights gain nothing.
SMALLEST = 2**19
#: Bytes of repacked weights beside a model's own; the largest layers come first.
MOST_BYTES = 2**30
#: Steps of generation from which repacking pays.
WORTHWHILE = 8


@contextmanager
def packed_layers(model: nn.Module, rows: int) -> Iterator[None]:
    """Let the large float32 layers on a CPU multiply repacked weights; the model's own stay as they are.

    Weights must not change inside. Results differ from the plain ones by rounding, and repeat bitwise.

    Args:
        model: any module.
        rows: how many are multiplied at a time, at most; more or fewer work as well.
    """
    layers = _chosen(model)
    for layer in layers:
        vars(layer)["forward"] = _PackedLinear(layer, rows)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _chosen(model: nn.Module) -> list[nn.Linear]:
    if not _serves():
        return []
    plain = [module for module in model.modules() if _is_plain(module)]
    fitting = [layer for layer in plain if layer.weight.numel() >= SMALLEST]
    chosen, left = [], MOST_BYTES
    for layer in sorted(fitting, key=lambda layer: layer.weight.numel(), reverse=True):
        if layer.weight.nbytes <= left:
            chosen.append(layer)
            left -= layer.weight.nbytes
    return chosen


def _serves() -> bool:
    # The two operators serve torch.compile and are not public.
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
    )


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """True for a linear layer whose forward nobody replaced, with a whole float32 weight on the CPU."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight.data
    return type(weight) is Tensor and weight.dtype == torch.float32 and weight.device.type == "cpu"


@final
class _PackedLinear:
    def __init__(self, layer: nn.Linear, rows: int) -> None:
        self._layer = layer
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)

    def __call__(self, hidden: Tensor) -> Tensor:
        layer = self._layer
        if hidden.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return nn.functional.linear(hidden, layer.weight, layer.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._packed, layer.bias, "none", [], "")
        return product
