"""Matrix products whose results are float32 whatever their operands' precision (docs/design.md#numerics).

On a CPU every operand is upcast to at least float32. A GPU multiplies half-precision operands 10 to 15 times faster and
adds their products up in float32 either way. A product of two bfloat16 or float16 numbers is exact in float32, so
upcasting first gains nothing, as long as the *result* is not rounded to half precision.

A float32 operand can be written as a sum of two bfloat16 ones: x ≈ hi + lo with |x − hi − lo| ≤ 2⁻¹⁷ |x|. Two (one
operand is half-precision) or three products then replace one, and what they omit, lo · lo, is at most 2⁻¹⁶ of a term.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum

import torch
from torch import Tensor

#: The summands of an operand, of one dtype, largest first.
Summands = tuple[Tensor, ...]

#: The types whose products are exact in float32.
HALF = (torch.bfloat16, torch.float16)
#: Types of devices that multiply half-precision operands into float32 results.
HALF_PRODUCT_DEVICES = frozenset({"cuda"})
#: Bytes of a result that exists twice where a device can't add a product to a float32 matrix in place.
_SLICE_BYTES = 2**26


class Products(StrEnum):
    """How heads are multiplied where half-precision products have float32 results; elsewhere it is always ``FLOAT32``.

    Operands of the same half precision stay as they are, except under ``FLOAT32``.
    """

    #: All others are upcast to float32.
    EXACT = "exact"
    #: All others are split into bfloat16 summands.
    SPLIT = "split"
    #: All others are upcast to float32 and multiplied in TF32: 11 significant bits.
    TF32 = "tf32"
    #: Every operand is upcast to float32.
    FLOAT32 = "float32"

    def on(self, device: torch.device) -> Products:
        """Return what a device does when asked for these products."""
        if device.type not in HALF_PRODUCT_DEVICES or not _has_float32_results(device, torch.bfloat16):
            return Products.FLOAT32
        return self


def at_least_float32(tensor: Tensor) -> Tensor:
    """Upcast half types to float32; float32 and float64 stay as they are (docs/design.md#numerics)."""
    return tensor.float() if tensor.dtype in HALF else tensor


def split(tensor: Tensor) -> Summands:
    """Return bfloat16 summands: one for a bfloat16 tensor, two for the first 16 bits of the significand of others."""
    high = tensor.bfloat16()
    if tensor.dtype == torch.bfloat16:
        return (high,)
    return high, (tensor - high).bfloat16()


def operands(left: Tensor, right: Tensor, products: Products) -> tuple[Summands, Summands]:
    """Return two operands as they are multiplied on their device.

    Args:
        left, right: of any float type; the result has the type of ``right``, at least float32.
        products: as ``Products.on`` returned it.
    """
    if products is not Products.FLOAT32 and left.dtype == right.dtype and left.dtype in HALF:
        return (left,), (right,)
    if products is Products.SPLIT and torch.float64 not in (left.dtype, right.dtype):
        return split(left), split(right)
    right = at_least_float32(right)
    return (at_least_float32(left).to(right.dtype),), (right,)


def add_product(
    total: Tensor, left: Summands, right: Summands, alpha: float = 1.0, beta: float = 1.0, tf32: bool = False
) -> Tensor:
    """Return ``beta · total + alpha · left · right``, in place; no gradient flows through it.

    Args:
        total: [n, m], at least float32; may be uninitialised if ``beta`` is 0.
        left, right: [n, k] and [k, m] summands, all of one dtype.
        alpha, beta: factors.
        tf32: multiply float32 operands in TF32.
    """
    # The small terms first; the product of two second summands is below the rounding of the first.
    pairs = [(a, b) for i, a in enumerate(left) for j, b in enumerate(right) if i + j < max(len(left), len(right))]
    with torch.no_grad(), torch.autocast(total.device.type, enabled=False), _tf32() if tf32 else nullcontext():
        for a, b in reversed(pairs):
            _add_one(total, a, b, alpha, beta)
            beta = 1.0
    return total


def _add_one(total: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta, alpha=alpha)
    elif total.device.type != "cuda":
        # Other devices have no such product; this is what it computes.
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta, alpha=alpha)
    elif _adds_in_place(total.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=alpha, out=total)
    else:
        size = max(1, _SLICE_BYTES // max(1, total.shape[1] * total.itemsize))
        for start in range(0, len(total), size):
            rows = slice(start, start + size)
            product = torch.mm(a[rows], b, out_dtype=total.dtype)
            total[rows] = product.mul_(alpha) if beta == 0.0 else product.mul_(alpha).add_(total[rows], alpha=beta)


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def _has_float32_results(device: torch.device, dtype: torch.dtype) -> bool:
    """Try a product on the device, once: PyTorch has it since 2.8, on cards that have it."""
    if device.type != "cuda":
        return True
    if torch.cuda.get_device_capability(device) < (8, 0) and torch.version.hip is None:
        # Without tensor cores for bfloat16 it would be slower than float32.
        return False
    ones, other = torch.ones(16, 16, device=device), torch.zeros(16, 16, device=device)
    other[0], other[1] = 1.0, 2.0**-12
    try:
        result = torch.mm(ones.to(dtype), other.to(dtype), out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    # No half-precision number: a rounded result would show.
    return bool((result == 1 + 2.0**-12).all())


@functools.cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Try it, once: PyTorch 2.8 adds such a product only to a matrix of the operands' dtype."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, beta=0.5, alpha=2.0, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 32.5).all())
