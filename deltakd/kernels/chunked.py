"""A loss over heads, one chunk of tokens at a time; the student's gradients are computed in the forward pass.

A chunk is computed in one of three ways: by hand (``fused.py``) if the loss has a fused form, over buckets
(``buckets.py``) if the references are stored as top-K log-probs, and otherwise by autograd through the loss's own
formula. ``tests/kernels/test_chunked.py`` shows for every ready-made loss that the sum and its gradients equal those of
all logits at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deltakd.kernels.buckets import Buckets, bucketed_chunk
from deltakd.kernels.fused import add_head_gradients, fused_chunk, fusible
from deltakd.types import (
    NO_FACTS,
    STUDENT,
    Head,
    HeadLogits,
    LinearKL,
    Loss,
    SequenceLoss,
    TokenFacts,
    at_least_float32,
)

#: MiB that the logits of a chunk, and everything computed from them, may take.
MEMORY_BUDGET = 256.0
#: Tensors the size of a chunk's logits that exist at once: by hand, without and with a gate, over a reduced vocabulary,
#: and under autograd in the most demanding loss.
_TENSORS = {"fused": 2, "gated": 3, "buckets": 4, "autograd": 16}
#: Smaller chunks spend their time on the head's gradient, which each chunk adds to as a whole.
_MIN_CHUNK = 32


def chunk_size_for(memory_budget: float, vocabulary: int, itemsize: int, form: str) -> int:
    """Return the number of tokens per chunk that fits in ``memory_budget`` MiB; at least 32, even if that takes more.

    Args:
        memory_budget: MiB.
        vocabulary: V.
        itemsize: bytes of a logit.
        form: ``fused`` or ``gated`` (by hand), ``buckets`` (over a reduced vocabulary), or ``autograd``.
    """
    return max(_MIN_CHUNK, int(memory_budget * 2**20 / (_TENSORS[form] * vocabulary * itemsize)))


def chunked_loss(
    loss: Loss,
    heads: Mapping[str, Head],
    labels: Tensor,
    chunk_size: int | None = None,
    memory_budget: float = MEMORY_BUDGET,
    buckets: Buckets | None = None,
    facts: TokenFacts = NO_FACTS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum a loss over N tokens, holding no more than one chunk of any model's logits.

    In training, each chunk's gradients are computed while its logits exist, and kept as gradients of the hidden states
    and the head. No logits live until the backward pass, and no head is multiplied twice.

    Args:
        loss: the loss; it sees logits [n, V] of ``student`` and of the roles that it requires.
        heads: role -> Head, all over the same N tokens and the same vocabulary.
        labels: [N] int64.
        chunk_size: tokens per chunk; None: as many as fit in the memory budget.
        memory_budget: MiB for the logits of a chunk and everything computed from them. The gradient of the head, at
            least float32, comes on top.
        buckets: the references over a reduced vocabulary, in place of their heads.
        facts: about the N tokens; a loss of whole sequences needs their rows.

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
    references = {} if buckets is not None else {role: heads[role].upcast() for role in sorted(loss.requires)}
    trained = [t for t in (student.hidden, student.weight, student.bias) if t is not None and t.requires_grad]
    wants_gradients = torch.is_grad_enabled() and bool(trained)
    form = fusible(loss, student, references) if wants_gradients and buckets is None else None
    itemsize = torch.promote_types(student.weight.dtype, torch.float32).itemsize
    kind = "buckets" if buckets is not None else "autograd" if form is None else form.kind
    size = chunk_size or chunk_size_for(memory_budget, student.weight.shape[0], itemsize, kind)
    if isinstance(loss, SequenceLoss):
        facts = _weighted(loss, student, references, labels, size, facts)
    work = _Work(loss, form, student, references, labels, size, buckets, facts)
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
    student = student.upcast()
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
    parts: dict[str, Tensor] = field(default_factory=dict)

    def run(self, grads: dict[str, Tensor] | None) -> Tensor:
        """Sum the loss; add each chunk's gradients to ``grads`` (hidden by rows, weight and bias in place)."""
        # Autocast would compute the products with gradients in half precision.
        with torch.autocast(self.student.hidden.device.type, enabled=False):
            return self._run(grads)

    def _run(self, grads: dict[str, Tensor] | None) -> Tensor:
        student = self.student.upcast()
        total = torch.zeros((), dtype=student.weight.dtype, device=student.weight.device)
        for start in range(0, len(self.labels), self.size):
            rows = slice(start, min(start + self.size, len(self.labels)))
            references = {role: head.rows(rows.start, rows.stop) for role, head in self.references.items()}
            chunk = student.rows(rows.start, rows.stop)
            if self.form is not None and grads is not None:
                values, grad_NV = fused_chunk(self.form, chunk, references, self.labels[rows])
                add_head_gradients(chunk, grad_NV, rows, grads)
            elif self.buckets is not None:
                values = _by_buckets(self.loss, chunk, self.buckets.rows(rows.start, rows.stop), rows, grads)
            else:
                facts = self.facts.part(rows)
                values = _by_autograd(self.loss, chunk, references, self.labels[rows], facts, rows, grads)
            total += values.pop("loss").sum()
            for name, value_N in values.items():
                self.parts[name] = self.parts.get(name, 0) + value_N.sum()
        return total


def _by_autograd(
    loss: Loss,
    chunk: Head,
    references: Mapping[str, Head],
    labels: Tensor,
    facts: TokenFacts,
    rows: slice,
    grads: dict[str, Tensor] | None,
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
    return {name: value_N.detach() for name, value_N in {**output.parts, "loss": output.per_token}.items()}


def _by_buckets(
    loss: Loss, chunk: Head, buckets: Buckets, rows: slice, grads: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """As ``_by_autograd``, over a reduced vocabulary; autograd keeps only tensors of that size."""
    if grads is None or chunk.softcap is None:
        values, grad_NV = bucketed_chunk(loss, chunk.logits(), buckets, grads is not None)
        if grads is not None and grad_NV is not None:
            add_head_gradients(chunk, grad_NV, rows, grads)
        return values
    chunk, leaves = _with_leaves(chunk, grads)
    with torch.enable_grad():
        z_NV = chunk.logits()
    values, grad_NV = bucketed_chunk(loss, z_NV.detach().clone(), buckets, True)
    _add_gradients(grads, leaves, torch.autograd.grad(z_NV, list(leaves.values()), grad_NV), rows)
    return values


def _add_gradients(
    grads: Mapping[str, Tensor], leaves: Mapping[str, Tensor], gradients: Sequence[Tensor], rows: slice
) -> None:
    for name, gradient in zip(leaves, gradients, strict=True):
        if name == "hidden":
            grads[name][rows] = gradient
        else:
            grads[name] += gradient


def _with_leaves(chunk: Head, grads: Mapping[str, Tensor]) -> tuple[Head, dict[str, Tensor]]:
    """Return the chunk with fresh leaves for the tensors whose gradients are wanted, and these leaves."""
    tensors = {"hidden": at_least_float32(chunk.hidden), "weight": chunk.weight, "bias": chunk.bias}
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name in grads and t is not None}
    tensors |= leaves
    assert tensors["hidden"] is not None
    assert tensors["weight"] is not None
    return Head(tensors["hidden"], tensors["weight"], tensors["bias"], chunk.softcap, chunk.scale), leaves


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
