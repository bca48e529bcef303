"""Logits not yet computed, and their precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from deltakd.types.role_names import STUDENT


def at_least_float32(tensor: Tensor) -> Tensor:
    """Upcast half types to float32; float32 and float64 stay as they are (docs/design.md#numerics)."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def in_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64 on its device, or on the CPU if the device has no float64 (MPS)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


#: Rows of logits begin at multiples of this many bytes, but not all at multiples of a page: a CPU's matrix product into
#: rows of odd length (V = 50,257) takes 1.5 times as long, and one of rows of whole pages 1.3 times.
_ALIGNED, _PAGE = 64, 4096


def aligned_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return an uninitialised [rows, columns], of ``like``'s dtype and device, for a matrix product to write into.

    Its rows may lie further apart than ``columns``.
    """
    width = columns * like.itemsize
    pitch = -(-width // _ALIGNED) * _ALIGNED
    pitch += _ALIGNED if pitch % _PAGE == 0 else 0
    return like.new_empty(rows, pitch // like.itemsize)[:, :columns]


@dataclass(frozen=True)
class Head:
    """Logits not yet computed: hidden states and output embedding.

    logits = softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap), without the tanh where ``softcap`` is None.

    Args:
        hidden: [N, D] last hidden states of the valid tokens.
        weight: [V, D] rows of the output embedding, cut to the vocabulary of the tokenizer.
        bias: [V] or None.
        softcap: the bound of Gemma2's soft-capping, or None.
        scale: factor on the logits (Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def rows(self, start: int, stop: int) -> Head:
        """Return the head of tokens ``start`` to ``stop`` (exclusive)."""
        return Head(self.hidden[start:stop], self.weight, self.bias, self.softcap, self.scale)

    def upcast(self) -> Head:
        """Return the head with weight and bias in at least float32, converted once instead of per chunk."""
        bias = None if self.bias is None else at_least_float32(self.bias)
        return Head(self.hidden, at_least_float32(self.weight), bias, self.softcap, self.scale)

    def logits(self) -> Tensor:
        """Return the logits, [N, V] in at least float32, computed with autocast off (docs/design.md#numerics)."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            weight_VD = at_least_float32(self.weight)
            logits_NV = at_least_float32(self.hidden).to(weight_VD.dtype) @ weight_VD.T
            if self.bias is not None:
                logits_NV = logits_NV + self.bias.to(weight_VD.dtype)
            if self.scale != 1.0:
                logits_NV = logits_NV * self.scale
            if self.softcap is not None:
                logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV

    def add_logits(self, total: Tensor | None, factor: float) -> Tensor:
        """Return ``total + factor · logits()``, added in place; a linear head adds inside the matrix product."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            if self.softcap is not None:
                logits_NV = self.logits()
                return logits_NV.mul_(factor) if total is None else total.add_(logits_NV, alpha=factor)
            weight_VD = at_least_float32(self.weight)
            hidden_ND = at_least_float32(self.hidden).to(weight_VD.dtype)
            if total is None:
                total = aligned_rows(len(hidden_ND), len(weight_VD), like=weight_VD)
                beta = 0.0
            else:
                beta = 1.0
            total.addmm_(hidden_ND, weight_VD.T, beta=beta, alpha=factor * self.scale)
            if self.bias is not None:
                total.add_(self.bias.to(weight_VD.dtype), alpha=factor * self.scale)
        return total


@dataclass(frozen=True)
class PairFacts:
    """Pairs of responses to the same prompt, among N tokens.

    Args:
        numbers: [N] int64, ascending: the pair of each token; both its responses are among the tokens.
        given: [N] bool: True in the data's response, False in the student's.
        tokens_per_pair: valid tokens of the whole optimiser step, over all ranks, divided by its pairs.
        tokens_per_given: the same tokens divided by those of the data's responses.
    """

    numbers: Tensor
    given: Tensor
    tokens_per_pair: float
    tokens_per_given: float

    def __getitem__(self, tokens: slice) -> PairFacts:
        return replace(self, numbers=self.numbers[tokens], given=self.given[tokens])


@dataclass(frozen=True)
class TokenFacts:
    """What a loss may know about N tokens besides logits and labels.

    Args:
        rows: [N] int64, ascending: the row that each token belongs to; None: unknown.
        sampled_log_probs: [N] nats, the labels' log-probs when an earlier student sampled them; None: they were not
            sampled, or the current student sampled them.
        weights: [N] or [N, k], computed from rewards by a loss of whole sequences (``SequenceLoss``); None for other
            losses.
        pairs: for a loss of pairs; None: the tokens are not in pairs.
    """

    rows: Tensor | None = None
    sampled_log_probs: Tensor | None = None
    weights: Tensor | None = None
    pairs: PairFacts | None = None

    def part(self, tokens: slice) -> TokenFacts:
        """Return the facts about some of the tokens."""
        return TokenFacts(*(None if fact is None else fact[tokens] for fact in vars(self).values()))


#: Nothing is known.
NO_FACTS = TokenFacts()


@final
class HeadLogits(Mapping[str, Tensor]):
    """Logits by role, computed on first access, and weighted sums of them.

    A loss may read it like a dict. Logits read by name are kept. A ``combined`` sum of roles not read by name takes the
    memory of one tensor of logits, for any number of roles.

    Args:
        student: [N, V] the student's logits, on the graph.
        heads: role -> Head of the references, over the same N tokens.
        facts: about the N tokens.
    """

    def __init__(self, student: Tensor, heads: Mapping[str, Head], facts: TokenFacts = NO_FACTS) -> None:
        self._heads = heads
        self._made = {STUDENT: student}
        self.facts = facts

    def __getitem__(self, role: str) -> Tensor:
        if role not in self._made:
            with torch.no_grad():
                self._made[role] = self._heads[role].logits()
        return self._made[role]

    def __iter__(self) -> Iterator[str]:
        return iter((STUDENT, *self._heads))

    def __len__(self) -> int:
        return 1 + len(self._heads)

    @torch.no_grad()
    def combined(self, coefficients: Mapping[str, float]) -> Tensor:
        """Return Σ coefficient · logits[role]: [N, V], new and detached; −inf where a head's bias rules a token out."""
        total: Tensor | None = None
        # Computed logits first: the other heads' products are then added in place.
        for role in sorted(coefficients, key=lambda role: role not in self._made):
            factor = coefficients[role]
            if role in self._made:
                term = self._made[role]
                total = term * factor if total is None else total.add_(term, alpha=factor)
            else:
                total = self._heads[role].add_logits(total, factor)
        assert total is not None, "a sum of no roles"
        for role in coefficients:
            bias = self._heads[role].bias if role in self._heads else None
            if bias is not None:
                total.masked_fill_(torch.isneginf(bias), -torch.inf)
        return total
