"""A loss over heads, one chunk of tokens at a time; the student's gradients are computed in the forward pass.

A chunk is computed in one of three ways: by hand (``fused.py``, on an NVIDIA GPU with the kernels of ``gpu/``) if the
loss has a fused form, over buckets (``buckets.py``) if the references are stored as top-K log-probs, and otherwise by
autograd through the loss's own formula. ``tests/kernels/test_chunked.py`` shows for every ready-made loss that the sum
and its gradients equal those of all logits at once; ``tests/kernels/test_gpu.py`` does so for the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deltakd.kernels import gpu
from deltakd.kernels.blocks import ChunkBuffers
from deltakd.kernels.buckets import Buckets, bucketed_chunk, triton_bucketed_chunk
from deltakd.kernels.fused import fused_chunk, fusible, triton_chunk, triton_form
from deltakd.kernels.head_gradients import HeadGradients, gradient_bound
from deltakd.kernels.options import KernelOptions
from deltakd.types import (
    NO_FACTS,
    STUDENT,
    Head,
    HeadLogits,
    LinearKL,
    Loss,
    LossOutput,
    SequenceLoss,
    TokenFacts,
    at_least_float32,
)

_AS_THE_DEVICE_ALLOWS = KernelOptions()


def chunked_loss(
    loss: Loss,
    heads: Mapping[str, Head],
    labels: Tensor,
    chunk_size: int | None = None,
    buckets: Buckets | None = None,
    facts: TokenFacts = NO_FACTS,
    options: KernelOptions = _AS_THE_DEVICE_ALLOWS,
    buffers: ChunkBuffers | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum a loss over N tokens, holding no more than one chunk of any model's logits.

    In training, each chunk's gradients are computed while its logits exist, and kept as gradients of the hidden states
    and the head. No logits live until the backward pass, and no head is multiplied twice.

    Args:
        loss: the loss; it sees logits [n, V] of ``student`` and of the roles that it requires.
        heads: role -> Head, all over the same N tokens and the same vocabulary.
        labels: [N] int64.
        chunk_size: tokens per chunk; None: as many as fit in the memory budget of ``options``.
        buckets: the references over a reduced vocabulary, in place of their heads.
        facts: about the N tokens; a loss of whole sequences needs their rows.
        options: memory and precision.
        buffers: memory to use again in the next call; None: it is freed.

    Returns:
        The sum of ``per_token`` (nats; differentiable w.r.t. the student's hidden, weight and bias), and the detached
        sum of each part. For N = 0: a zero attached to the graph, and no parts.

    Raises:
        ValueError: a required role has no head, the heads disagree in N or V, or a loss of whole sequences has no rows.
    """
    _check_heads(loss, heads, labels, buckets)
    student = heads[STUDENT]
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or None to choose one")
    if len(student) == 0:
        return _attached_zero(student), {}
    references = {}
    if buckets is None:
        references = {role: heads[role].prepared(options.products) for role in sorted(loss.requires)}
    trained = [t for t in (student.hidden, student.weight, student.bias) if t is not None and t.requires_grad]
    wants_gradients = torch.is_grad_enabled() and bool(trained)
    form = triton_form(loss, student, references) if options.triton and buckets is None else None
    by_triton = form is not None or (
        options.triton and buckets is not None and gpu.serves(student.hidden.device, student.dtype)
    )
    if form is None and wants_gradients and buckets is None:
        form = fusible(loss, student, references)
    kind = "buckets" if buckets is not None else "autograd" if form is None else form.kind
    vocabulary, device = student.weight.shape[0], student.hidden.device
    size = chunk_size or options.chunk_size(len(student), vocabulary, student.dtype.itemsize, kind, device)
    student = replace(student, products=options.products)
    if isinstance(loss, SequenceLoss):
        facts = _weighted(loss, student, references, labels, size, facts)
    work = _Work(loss, form, student, references, labels, size, buckets, facts, by_triton, buffers or ChunkBuffers())
    if not wants_gradients:
        with torch.no_grad():
            return work.run(None), work.parts
    return _ChunkedLoss.apply(student.hidden, student.weight, student.bias, work), work.parts


def _attached_zero(student: Head) -> Tensor:
    """Return a zero that gives every trained tensor of the head a gradient: data-parallel training waits for all."""
    tensors = (student.hidden, student.weight[:0], None if student.bias is None else student.bias[:0])
    return sum(
        (at_least_float32(t).sum() for t in tensors if t is not None), torch.zeros((), device=student.hidden.device)
    )


def _check_heads(loss: Loss, heads: Mapping[str, Head], labels: Tensor, buckets: Buckets | None) -> None:
    if buckets is not None:
        if loss.requires - set(buckets.log_probs) or not len(heads[STUDENT]) == len(labels) == len(buckets):
            raise ValueError(
                f"the loss needs buckets of {len(labels)} tokens for {sorted(loss.requires)}; there are {len(buckets)} "
                f"for {sorted(buckets.log_probs)}"
            )
        return
    missing = sorted({STUDENT, *loss.requires} - set(heads))
    if missing:
        raise ValueError(f"the loss needs heads for {missing}; heads were given for {sorted(heads)}")
    shapes = {role: (len(heads[role]), heads[role].weight.shape[0]) for role in (STUDENT, *loss.requires)}
    if {n for n, _ in shapes.values()} != {len(labels)} or len({v for _, v in shapes.values()}) != 1:
        raise ValueError(f"heads must agree in (tokens, vocabulary) and have {len(labels)} tokens; given: {shapes}")


@torch.no_grad()
def _weighted(
    loss: SequenceLoss,
    student: Head,
    references: Mapping[str, Head],
    labels: Tensor,
    size: int,
    facts: TokenFacts,
) -> TokenFacts:
    """Return the facts with a loss's weights, from a first pass over the chunks."""
    if facts.rows is None:
        raise ValueError(f"{type(loss).__name__} is a loss of whole sequences: give facts=TokenFacts(rows=...)")
    student = student.prepared()
    rewards = []
    for start in range(0, len(labels), size):
        tokens = slice(start, min(start + size, len(labels)))
        some = {role: head.rows(tokens.start, tokens.stop) for role, head in references.items()}
        logits = HeadLogits(student.rows(tokens.start, tokens.stop).logits(), some, facts.part(tokens))
        rewards.append(loss.token_rewards(logits, labels[tokens]))
    return replace(facts, weights=loss.sequence_weights(torch.cat(rewards), facts))


@dataclass
class _Work:
    """A loss over N tokens and how to cut it into chunks; ``run`` fills ``parts``, which carry no gradient."""

    loss: Loss
    form: LinearKL | None
    student: Head
    references: Mapping[str, Head]
    labels: Tensor
    size: int
    buckets: Buckets | None = None
    facts: TokenFacts = NO_FACTS
    by_triton: bool = False
    buffers: ChunkBuffers = field(default_factory=ChunkBuffers)
    parts: dict[str, Tensor] = field(default_factory=dict)

    def run(self, grads: dict[str, Tensor] | None) -> Tensor:
        """Sum the loss; add each chunk's gradients to ``grads`` (hidden by rows, weight and bias in place)."""
        # Autocast would compute the products with gradients in half precision.
        with torch.autocast(self.student.hidden.device.type, enabled=False):
            return self._run(grads)

    def _run(self, grads: dict[str, Tensor] | None) -> Tensor:
        student = self.student.prepared()
        gradients = None
        if grads is not None:
            gradients = HeadGradients(student, grads, None if self.form is None else gradient_bound(self.form))
        total = torch.zeros((), dtype=student.dtype, device=student.weight.device)
        for start in range(0, len(self.labels), self.size):
            rows = slice(start, min(start + self.size, len(self.labels)))
            values = self._chunk(student.rows(rows.start, rows.stop), rows, gradients)
            total += values.pop("loss").sum()
            for name, value_N in values.items():
                self.parts[name] = self.parts.get(name, 0) + value_N.sum()
        return total

    def _chunk(self, chunk: Head, rows: slice, gradients: HeadGradients | None) -> dict[str, Tensor]:
        references = {role: head.rows(rows.start, rows.stop) for role, head in self.references.items()}
        labels = self.labels[rows]
        if self.form is not None and self.by_triton:
            wanted = None if gradients is None else gradients.format
            values, summands = triton_chunk(self.form, chunk, references, labels, wanted)
            if gradients is not None:
                gradients.add_summands(summands, rows)
            return values
        if self.form is not None and gradients is not None:
            values, grad_NV = fused_chunk(self.form, chunk, references, labels, self.buffers)
            gradients.add(grad_NV, rows)
            return values
        if self.buckets is not None and self.by_triton:
            wanted = None if gradients is None else gradients.format
            some = self.buckets.rows(rows.start, rows.stop)
            values, summands = triton_bucketed_chunk(self.loss, chunk.logits(), some, wanted, chunk.softcap)
            if gradients is not None:
                gradients.add_summands(summands, rows)
            return values
        if self.buckets is not None:
            return _by_buckets(self.loss, chunk, self.buckets.rows(rows.start, rows.stop), rows, gradients)
        facts = self.facts.part(rows)
        if gradients is None or chunk.multiplies_in_float32:
            grads = None if gradients is None else gradients.buffers
            return _by_autograd(self.loss, chunk, references, labels, facts, rows, grads)
        return _from_logits(self.loss, chunk, references, labels, facts, rows, gradients)


def _by_autograd(
    loss: Loss,
    chunk: Head,
    references: Mapping[str, Head],
    labels: Tensor,
    facts: TokenFacts,
    rows: slice,
    grads: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Return ``loss`` and the parts of a chunk, detached; add its gradients to ``grads``."""
    leaves: dict[str, Tensor] = {}
    if grads is not None:
        chunk, leaves = _with_leaves(chunk, grads)
    with torch.set_grad_enabled(grads is not None):
        output = loss(HeadLogits(chunk.logits(), references, facts), labels)
        chunk_sum = output.per_token.sum()
    if grads is not None and chunk_sum.requires_grad:
        _add_gradients(grads, leaves, torch.autograd.grad(chunk_sum, list(leaves.values())), rows)
    return _detached(output)


def _from_logits(
    loss: Loss,
    chunk: Head,
    references: Mapping[str, Head],
    labels: Tensor,
    facts: TokenFacts,
    rows: slice,
    gradients: HeadGradients,
) -> dict[str, Tensor]:
    """As ``_by_autograd``, which ends at the logits: products of half-precision operands are not its business."""
    z_NV = chunk.logits().requires_grad_()
    with torch.enable_grad():
        output = loss(HeadLogits(z_NV, references, facts), labels)
        chunk_sum = output.per_token.sum()
    if chunk_sum.requires_grad:
        (grad_NV,) = torch.autograd.grad(chunk_sum, z_NV)
        gradients.add(_before_capping(chunk, z_NV.detach(), grad_NV), rows)
    return _detached(output)


def _before_capping(chunk: Head, z_NV: Tensor, grad_NV: Tensor) -> Tensor:
    """Return the gradient w.r.t. the logits before soft-capping, c · tanh(z / c), whose derivative is 1 − (z / c)²."""
    if chunk.softcap is None:
        return grad_NV
    return grad_NV.mul(z_NV.div_(chunk.softcap).square_().neg_().add_(1.0))


def _detached(output: LossOutput) -> dict[str, Tensor]:
    return {name: value_N.detach() for name, value_N in {**output.parts, "loss": output.per_token}.items()}


def _by_buckets(
    loss: Loss, chunk: Head, buckets: Buckets, rows: slice, gradients: HeadGradients | None
) -> dict[str, Tensor]:
    """As ``_by_autograd``, over a reduced vocabulary; autograd keeps only tensors of that size."""
    if gradients is None or chunk.softcap is None:
        values, grad_NV = bucketed_chunk(loss, chunk.logits(), buckets, gradients is not None)
        if gradients is not None and grad_NV is not None:
            gradients.add(grad_NV, rows)
        return values
    if not chunk.multiplies_in_float32:
        z_NV = chunk.logits()
        values, grad_NV = bucketed_chunk(loss, z_NV.clone(), buckets, True)
        if grad_NV is not None:
            gradients.add(_before_capping(chunk, z_NV, grad_NV), rows)
        return values
    chunk, leaves = _with_leaves(chunk, gradients.buffers)
    with torch.enable_grad():
        z_NV = chunk.logits()
    values, grad_NV = bucketed_chunk(loss, z_NV.detach().clone(), buckets, True)
    _add_gradients(gradients.buffers, leaves, torch.autograd.grad(z_NV, list(leaves.values()), grad_NV), rows)
    return values


def _add_gradients(
    grads: Mapping[str, Tensor], leaves: Mapping[str, Tensor], gradients: Sequence[Tensor], rows: slice
) -> None:
    for name, gradient in zip(leaves, gradients, strict=True):
        if name == "hidden":
            grads[name][rows] = gradient
        else:
            grads[name].add_(gradient)


def _with_leaves(chunk: Head, grads: Mapping[str, Tensor]) -> tuple[Head, dict[str, Tensor]]:
    """Return the chunk with fresh leaves for the tensors whose gradients are wanted, and these leaves."""
    tensors = {"hidden": at_least_float32(chunk.hidden), "weight": chunk.weight, "bias": chunk.bias}
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name in grads and t is not None}
    tensors |= leaves
    assert tensors["hidden"] is not None
    assert tensors["weight"] is not None
    return replace(chunk, hidden=tensors["hidden"], weight=tensors["weight"], bias=tensors["bias"]), leaves


class _ChunkedLoss(torch.autograd.Function):
    """The sum of a loss whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> Tensor:
        inputs = {"hidden": hidden, "weight": weight, "bias": bias}
        wanted = {
            name: t
            for (name, t), needed in zip(inputs.items(), ctx.needs_input_grad[:3], strict=True)
            if needed and t is not None
        }
        # Half-precision heads sum their gradient in float32: over many chunks bfloat16 would lose small terms.
        grads = {
            name: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for name, t in wanted.items()
        }
        total = work.run(grads)
        ctx.dtypes = {name: t.dtype for name, t in wanted.items()}
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError("the gradients of a chunked loss can be taken once: they are handed on, not copied")
        # In place: a copy of the head's gradient could be the largest tensor of the step.
        grads = {name: gradient.mul_(grad_total).to(ctx.dtypes[name]) for name, gradient in ctx.grads.items()}
        ctx.grads = None
        return (grads.get("hidden"), grads.get("weight"), grads.get("bias"), None)
