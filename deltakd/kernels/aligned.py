"""A loss of two tokenizers, one chunk of spans at a time; gradients are computed in the forward pass.

As ``chunked_loss``, but the teachers' heads are over tokens of their own. Chunks are cut at borders of spans, and a
loss may add heads whose hidden states it computes (``Loss.derived_heads``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deltakd.kernels.options import KernelOptions
from deltakd.types import STUDENT, TEACHER, AlignedLogits, AlignedTokens, Head, Loss, Products, at_least_float32


def aligned_loss(
    loss: Loss,
    heads: Mapping[str, Head],
    tokens: AlignedTokens,
    chunk_size: int | None = None,
    options: KernelOptions | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum a loss over the student's N tokens and the teachers' M, holding one chunk of any model's logits.

    Args:
        loss: a loss that ``needs_alignment``.
        heads: role -> Head: of student and raw student over N tokens, of teachers over M.
        tokens: of both sides.
        chunk_size: tokens per chunk on each side; a longer span is a chunk by itself. None: as many as fit in the
            memory budget of ``options``.
        options: memory, and how references are multiplied; None: as the device allows.

    Returns:
        The sum (nats; differentiable in the student's head and in ``loss.trainable``), and the detached sum of each
        part.

    Raises:
        ValueError: a required role has no head, or one that is not over the tokens of its side.
    """
    _check(loss, heads, tokens)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or None to choose one")
    tokens = loss.aligned(tokens)
    student, references = heads[STUDENT], {role: heads[role] for role in sorted(loss.requires)}
    # Projections run in their own dtype, as the heads do.
    with torch.autocast(student.hidden.device.type, enabled=False):
        derived = dict(loss.derived_heads({STUDENT: student, **references}, tokens))
    options = options or KernelOptions()
    size = chunk_size or _chunk_size(options, student, references)
    references = {role: replace(head, products=options.products) for role, head in references.items()}
    work = _Work(loss, {STUDENT: student, **derived}, references, tokens, size)
    inputs = work.inputs()
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.values())):
        with torch.no_grad():
            return work.run(None), work.parts
    return _AlignedLoss.apply(work, tuple(inputs), *inputs.values()), work.parts


def _check(loss: Loss, heads: Mapping[str, Head], tokens: AlignedTokens) -> None:
    missing = sorted({STUDENT, *loss.requires} - set(heads))
    if missing:
        raise ValueError(f"the loss needs heads for {missing}; heads were given for {sorted(heads)}")
    for role in (STUDENT, *sorted(loss.requires)):
        wanted = len(tokens.other.labels if is_other(role) else tokens.student.labels)
        if len(heads[role]) != wanted:
            raise ValueError(f"the head of {role} is over {len(heads[role])} tokens; its side has {wanted}")


def is_other(role: str) -> bool:
    """True if the logits of a role, or of a derived head, are over the teachers' tokens."""
    return role.startswith(TEACHER)


def _chunk_size(options: KernelOptions, student: Head, references: Mapping[str, Head]) -> int:
    other = max((len(head.weight) for role, head in references.items() if is_other(role)), default=0)
    # A chunk holds both sides' logits, each as often as the most demanding loss of one tokenizer.
    vocabulary = len(student.weight) + other
    return options.chunk_size(len(student), vocabulary, student.dtype.itemsize, "autograd", student.hidden.device)


@dataclass
class _Work:
    """A loss over both sides' tokens and how to cut it; ``run`` fills ``parts``, which carry no gradient.

    Args:
        loss: the loss.
        trained: name -> Head: the student's and those derived from hidden states.
        references: role -> Head.
        tokens: of both sides.
        size: tokens per chunk.
    """

    loss: Loss
    trained: dict[str, Head]
    references: dict[str, Head]
    tokens: AlignedTokens
    size: int
    parts: dict[str, Tensor] = field(default_factory=dict)

    def inputs(self) -> dict[str, Tensor]:
        """Name -> tensor that may get a gradient: hidden states of all trained heads, the student's whole head."""
        student = self.trained[STUDENT]
        found = {f"hidden.{name}": head.hidden for name, head in self.trained.items()}
        found["weight"] = student.weight
        return found if student.bias is None else {**found, "bias": student.bias}

    def run(self, grads: dict[str, Tensor] | None) -> Tensor:
        """Sum the loss; add each chunk's gradients to ``grads``."""
        # Autograd differentiates products of upcast operands alone.
        trained = {name: head.prepared(Products.FLOAT32) for name, head in self.trained.items()}
        references = {role: head.prepared() for role, head in self.references.items()}
        weight = trained[STUDENT].weight
        total = torch.zeros((), dtype=weight.dtype, device=weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            for student, other in self.tokens.alignment.chunks(self.size):
                total += self._chunk(trained, references, student, other, grads)
        return total

    def _chunk(
        self,
        trained: Mapping[str, Head],
        references: Mapping[str, Head],
        student: slice,
        other: slice,
        grads: dict[str, Tensor] | None,
    ) -> Tensor:
        def part(role: str, head: Head) -> Head:
            tokens = other if is_other(role) else student
            return head.rows(tokens.start, tokens.stop)

        chunk = {name: part(name, head) for name, head in trained.items()}
        leaves: dict[str, Tensor] = {}
        if grads is not None:
            chunk, leaves = _with_leaves(chunk, grads)
        tokens = self.tokens.part(student, other)
        with torch.set_grad_enabled(grads is not None):
            made = {name: head.logits() for name, head in chunk.items()}
            logits = AlignedLogits(made, {role: part(role, head) for role, head in references.items()}, tokens)
            output = self.loss(logits, tokens.student.labels)
            total = output.total
        if grads is not None and total.requires_grad:
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is None:
                    continue
                if name.startswith("hidden."):
                    rows = other if is_other(name.removeprefix("hidden.")) else student
                    grads[name][rows] = gradient
                else:
                    grads[name] += gradient
        for name, value_N in output.parts.items():
            self.parts[name] = self.parts.get(name, 0) + value_N.detach().sum()
        return total.detach()


def _with_leaves(chunk: Mapping[str, Head], grads: Mapping[str, Tensor]) -> tuple[dict[str, Head], dict[str, Tensor]]:
    """Return the heads with fresh leaves for the tensors whose gradients are wanted, and these leaves."""
    student = chunk[STUDENT]
    tensors = {f"hidden.{name}": at_least_float32(head.hidden) for name, head in chunk.items()}
    tensors["weight"] = student.weight
    if student.bias is not None:
        tensors["bias"] = student.bias
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if name in grads}
    tensors |= leaves
    heads = {name: replace(head, hidden=tensors[f"hidden.{name}"]) for name, head in chunk.items()}
    heads[STUDENT] = replace(heads[STUDENT], weight=tensors["weight"], bias=tensors.get("bias"))
    return heads, leaves


class _AlignedLoss(torch.autograd.Function):
    """The sum of a loss whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, work: _Work, names: tuple[str, ...], *tensors: Tensor) -> Tensor:
        wanted = {
            name: tensor
            for name, tensor, needed in zip(names, tensors, ctx.needs_input_grad[2:], strict=True)
            if needed
        }
        grads = {
            name: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for name, t in wanted.items()
        }
        total = work.run(grads)
        ctx.names, ctx.dtypes, ctx.grads = names, {name: t.dtype for name, t in wanted.items()}, grads
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError("the gradients of a chunked loss can be taken once: they are handed on, not copied")
        grads = {name: gradient.mul_(grad_total).to(ctx.dtypes[name]) for name, gradient in ctx.grads.items()}
        ctx.grads = None
        return (None, None, *(grads.get(name) for name in ctx.names))
