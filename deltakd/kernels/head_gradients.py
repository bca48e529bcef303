"""From gradients w.r.t. logits to those of hidden states, output embedding and bias.

On a GPU the products have half-precision operands and float32 results. Rounding the gradient w.r.t. logits to bfloat16
would cost 2·10⁻³ of the result, so it is one float16 number times a power of two, chosen so that the largest possible
gradient just fits (2·10⁻⁴; the smallest number kept is 2·10⁻¹² of it), or, where that is unknown or the weight is
float32, two bfloat16 numbers (3·10⁻⁶). ``tests/kernels/test_products.py`` measures both against float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from deltakd.types import Head, LinearKL, Products
from deltakd.types.heads import aligned_rows
from deltakd.types.products import HALF, Summands, add_product, split

_LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class GradientFormat:
    """How a gradient w.r.t. logits is multiplied: Σ summands / scale.

    Args:
        dtype: of the summands.
        count: of summands: 1, or 2 in bfloat16.
        scale: a power of two.
    """

    dtype: torch.dtype
    count: int = 1
    scale: float = 1.0

    def summands(self, grad_NV: Tensor) -> Summands:
        """Return the summands of a gradient, at least float32; it may be overwritten."""
        if self.count == 2:
            high_NV = self.empty(grad_NV).copy_(grad_NV)
            return high_NV, self.empty(grad_NV).copy_(grad_NV.sub_(high_NV))
        if self.dtype == torch.float16:
            grad_NV.mul_(self.scale).clamp_(-_LARGEST_FLOAT16, _LARGEST_FLOAT16)
            return (self.empty(grad_NV).copy_(grad_NV),)
        return (grad_NV,)

    def empty(self, grad_NV: Tensor) -> Tensor:
        """Return an uninitialised summand of a gradient, in rows that tensor cores read well."""
        rows, columns = grad_NV.shape
        return aligned_rows(rows, columns, like=grad_NV.new_empty(0, dtype=self.dtype))

    def operand(self, tensor: Tensor) -> Summands:
        """Return the other factor of a product with the gradient."""
        if self.count == 2:
            return split(tensor)
        return (_float16(tensor) if self.dtype == torch.float16 else tensor.to(self.dtype),)


def gradient_format(student: Head, bound: float | None) -> GradientFormat:
    """Return how the gradient w.r.t. the logits of a prepared head is multiplied.

    Args:
        student: the head.
        bound: the largest possible absolute value of the gradient; None if it is unknown.
    """
    if student.multiplies_in_float32 or student.dtype == torch.float64:
        return GradientFormat(student.dtype)
    if student.weight.dtype in HALF and student.hidden.dtype == student.weight.dtype:
        if bound is None:
            return GradientFormat(torch.bfloat16, 2)
        return GradientFormat(torch.float16, 1, 2.0 ** math.floor(math.log2(_LARGEST_FLOAT16 / bound)))
    return GradientFormat(torch.bfloat16, 2) if student.products is Products.SPLIT else GradientFormat(torch.float32)


def gradient_bound(form: LinearKL) -> float:
    """Return the largest absolute value of the gradient of a loss by hand w.r.t. a logit.

    That of KL(q ‖ p) grows with log q − log p, up to 128 nats here; what is larger is cut to that when multiplied.
    """
    of_divergence = form.mixture.bound if form.mixture is not None else 128.0 if form.reverse else 1.0
    return form.ce_weight + (1 - form.ce_weight) * form.scale / form.temperature * of_divergence


@final
class HeadGradients:
    """Adds up the gradients of a head's tensors over chunks of tokens.

    Args:
        student: the prepared head over all N tokens.
        buffers: name -> buffer, for the gradients that are wanted: ``hidden`` [N, D], ``weight`` [V, D], ``bias`` [V].
        bound: as for ``gradient_format``.
    """

    def __init__(self, student: Head, buffers: Mapping[str, Tensor], bound: float | None = None) -> None:
        self.buffers = buffers
        self.format = gradient_format(student, bound)
        self._student = student
        self._weight: Summands = ()
        if "hidden" in buffers and not student.multiplies_in_float32:
            # Under SPLIT the forward pass has the same summands already.
            known = self.format.count == 2 and {part.dtype for part in student.summands} == {torch.bfloat16}
            self._weight = student.summands if known else self.format.operand(student.weight.detach())

    def add(self, grad_NV: Tensor, rows: slice) -> None:
        """Add the gradients of a chunk.

        Args:
            grad_NV: the gradient of the loss w.r.t. the chunk's logits before any soft-capping; overwritten.
            rows: the chunk's place among all tokens.
        """
        self.add_summands(self.format.summands(grad_NV), rows)

    def add_summands(self, grad_NV: Summands, rows: slice) -> None:
        """Do the same with the summands of the gradient, as ``format`` has them."""
        if self._student.multiplies_in_float32:
            self._add_in_float32(grad_NV[0], rows)
            return
        student, buffers = self._student, self.buffers
        alpha = student.scale / self.format.scale
        tf32 = student.products is Products.TF32
        if "hidden" in buffers:
            add_product(buffers["hidden"][rows], grad_NV, self._weight, alpha, beta=0.0, tf32=tf32)
        if "weight" in buffers:
            hidden = self.format.operand(student.hidden[rows].detach())
            add_product(buffers["weight"], tuple(part.T for part in grad_NV), hidden, alpha, tf32=tf32)
        if "bias" in buffers:
            for part in grad_NV:
                buffers["bias"].add_(part.sum(0, dtype=buffers["bias"].dtype), alpha=alpha)

    def _add_in_float32(self, grad_NV: Tensor, rows: slice) -> None:
        student, buffers = self._student, self.buffers
        if student.scale != 1.0:
            grad_NV.mul_(student.scale)
        if "hidden" in buffers:
            torch.mm(grad_NV, student.weight, out=buffers["hidden"][rows])
        if "weight" in buffers:
            buffers["weight"].addmm_(grad_NV.T, student.hidden[rows].to(grad_NV.dtype))
        if "bias" in buffers:
            buffers["bias"].add_(grad_NV.sum(0))


def _float16(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float16 else tensor.clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16).half()
