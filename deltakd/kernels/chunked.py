"""A loss over heads, a chunk of tokens at a time, with the student's gradients made in the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltakd.types import STUDENT, Head, HeadLogits, Loss, at_least_float32

#: Bytes that one chunk's logits of one model may take where the caller does not choose a chunk size.
CHUNK_BYTES = 32 * 2**20


def default_chunk_size(vocabulary: int) -> int:
    """Tokens a chunk such that one model's float32 logits fill about CHUNK_BYTES (at least 32)."""
    return max(32, CHUNK_BYTES // (4 * vocabulary))


def chunked_loss(
    loss: Loss, heads: Mapping[str, Head], labels: Tensor, chunk_size: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum a loss over N tokens without holding more than a chunk of logits of any model.

    Where gradients are wanted, each chunk's gradients are made while its logits exist and kept in the size of hidden
    states and head; no logits live until the backward pass, and no head is multiplied twice.

    Args:
        loss: the loss; it sees logits [n, V] of ``student`` and of the roles that it requires.
        heads: role -> Head over the same N tokens and the same vocabulary.
        labels: [N] int64.
        chunk_size: tokens a chunk; None chooses one by the size of the vocabulary.

    Returns:
        The sum of ``per_token`` (nats; differentiable in the student's hidden, weight and bias) and the detached sum
        of each part. For N = 0: a zero that is attached to the graph, and no parts.

    Raises:
        ValueError: a required role has no head, or the heads disagree in N or V.
    """
    _check_heads(loss, heads, labels)
    student = heads[STUDENT]
    size = chunk_size or default_chunk_size(student.weight.shape[0])
    if size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or None to choose one")
    if len(student) == 0:
        return at_least_float32(student.hidden).sum() + 0.0 * at_least_float32(student.weight[:1]).sum(), {}
    references = {role: heads[role].upcast() for role in sorted(loss.requires)}
    trained = [t for t in (student.hidden, student.weight, student.bias) if t is not None and t.requires_grad]
    if not (torch.is_grad_enabled() and trained):
        with torch.no_grad():
            return _sum_over_chunks(loss, student.upcast(), references, labels, size, grads=None)
    # The parts go round the autograd function through this dict: they carry no gradient.
    parts: dict[str, Tensor] = {}
    total = _ChunkedLoss.apply(
        student.hidden, student.weight, student.bias, student, references, labels, loss, size, parts
    )
    return total, parts


def _check_heads(loss: Loss, heads: Mapping[str, Head], labels: Tensor) -> None:
    missing = sorted({STUDENT, *loss.requires} - set(heads))
    if missing:
        raise ValueError(f"the loss needs heads for {missing}; heads were given for {sorted(heads)}")
    shapes = {role: (len(heads[role]), heads[role].weight.shape[0]) for role in (STUDENT, *loss.requires)}
    if {n for n, _ in shapes.values()} != {len(labels)} or len({v for _, v in shapes.values()}) != 1:
        raise ValueError(f"heads must agree in (tokens, vocabulary) and have {len(labels)} tokens; given: {shapes}")


def _sum_over_chunks(
    loss: Loss,
    student: Head,
    references: Mapping[str, Head],
    labels: Tensor,
    size: int,
    grads: dict[str, Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum loss and parts; add the gradients of each chunk to ``grads`` (hidden by rows, weight and bias in place)."""
    weight_VD = student.weight
    total = torch.zeros((), dtype=weight_VD.dtype, device=weight_VD.device)
    parts: dict[str, Tensor] = {}
    for start in range(0, len(labels), size):
        stop = min(start + size, len(labels))
        chunk = student.rows(start, stop)
        leaves: dict[str, Tensor] = {}
        if grads is not None:
            chunk, leaves = _with_leaves(chunk, grads)
        with torch.set_grad_enabled(grads is not None):
            others = {role: head.rows(start, stop) for role, head in references.items()}
            output = loss(HeadLogits(chunk.logits(), others), labels[start:stop])
            chunk_sum = output.per_token.sum()
        if grads is not None and chunk_sum.requires_grad:
            _accumulate(grads, leaves, chunk_sum, start, stop)
        total += chunk_sum.detach()
        for name, value_N in output.parts.items():
            parts[name] = parts.get(name, 0) + value_N.detach().sum()
    return total, parts


def _with_leaves(chunk: Head, grads: Mapping[str, Tensor]) -> tuple[Head, dict[str, Tensor]]:
    """The chunk with fresh leaves in place of the tensors whose gradients are wanted."""
    tensors = {"hidden": at_least_float32(chunk.hidden), "weight": chunk.weight, "bias": chunk.bias}
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name in grads and t is not None}
    tensors |= leaves
    assert tensors["hidden"] is not None
    assert tensors["weight"] is not None
    return Head(tensors["hidden"], tensors["weight"], tensors["bias"], chunk.softcap, chunk.scale), leaves


def _accumulate(
    grads: dict[str, Tensor], leaves: Mapping[str, Tensor], chunk_sum: Tensor, start: int, stop: int
) -> None:
    gradients = torch.autograd.grad(chunk_sum, list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        if name == "hidden":
            grads[name][start:stop] = gradient
        else:
            grads[name] += gradient


class _ChunkedLoss(torch.autograd.Function):
    """The sum of a loss whose gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        student: Head,
        references: Mapping[str, Head],
        labels: Tensor,
        loss: Loss,
        size: int,
        parts: dict[str, Tensor],
    ) -> Tensor:
        inputs = {"hidden": hidden, "weight": weight, "bias": bias}
        wanted = {
            name: t
            for (name, t), needed in zip(inputs.items(), ctx.needs_input_grad[:3], strict=True)
            if needed and t is not None
        }
        # Half-precision heads sum their gradient in float32: over many chunks bfloat16 would lose the small ones.
        grads = {
            name: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for name, t in wanted.items()
        }
        total, sums = _sum_over_chunks(loss, student.upcast(), references, labels, size, grads)
        parts.update(sums)
        ctx.dtypes = {name: t.dtype for name, t in wanted.items()}
        ctx.names = list(grads)
        ctx.save_for_backward(*grads.values())
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = {
            name: (grad_total * gradient).to(ctx.dtypes[name])
            for name, gradient in zip(ctx.names, ctx.saved_tensors, strict=True)
        }
        return (grads.get("hidden"), grads.get("weight"), grads.get("bias"), *(None,) * 6)
