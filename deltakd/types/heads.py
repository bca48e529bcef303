"""Logits not yet computed, and their precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from deltakd.types.products import Products, Summands, add_product, at_least_float32, operands
from deltakd.types.role_names import STUDENT


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
        products: how hidden states and weight are multiplied.
        summands: the weight as ``prepared`` converted it for these products; empty: it is converted at each product.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    products: Products = Products.EXACT
    summands: Summands = ()

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def at(self, tokens: Tensor) -> Head:
        """Return the head of the tokens at some places, [n] int64."""
        return replace(self, hidden=self.hidden.index_select(0, tokens))

    def rows(self, start: int, stop: int) -> Head:
        """Return the head of tokens ``start`` to ``stop`` (exclusive)."""
        return replace(self, hidden=self.hidden[start:stop])

    @property
    def dtype(self) -> torch.dtype:
        """The type of the logits: that of the weight, at least float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def multiplies_in_float32(self) -> bool:
        """True if the device multiplies upcast operands, the only kind that autograd differentiates."""
        return self.products.on(self.hidden.device) is Products.FLOAT32

    def prepared(self, products: Products | None = None) -> Head:
        """Return the head with its weight as it is multiplied, converted once instead of per chunk.

        Args:
            products: how from now on; None: as before.
        """
        products = (self.products if products is None else products).on(self.hidden.device)
        bias = None if self.bias is None else at_least_float32(self.bias)
        if products is Products.FLOAT32:
            return replace(self, weight=at_least_float32(self.weight), bias=bias, products=products, summands=())
        summands = operands(self.hidden[:0], self.weight.detach(), products)[1]
        return replace(self, bias=bias, products=products, summands=summands)

    def logits(self) -> Tensor:
        """Return the logits, [N, V] in at least float32, computed with autocast off (docs/design.md#numerics).

        With a graph if hidden states or weight are trained; operands are then upcast, whatever ``products`` says.
        """
        with torch.autocast(self.hidden.device.type, enabled=False):
            if self.multiplies_in_float32 or self._has_graph():
                weight_VD = at_least_float32(self.weight)
                logits_NV = at_least_float32(self.hidden).to(weight_VD.dtype) @ weight_VD.T
                if self.bias is not None:
                    logits_NV = logits_NV + self.bias.to(weight_VD.dtype)
                if self.scale != 1.0:
                    logits_NV = logits_NV * self.scale
                if self.softcap is not None:
                    logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
                return logits_NV
            logits_NV = self._add_uncapped(None, 1.0, 1.0)
            return logits_NV if self.softcap is None else logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)

    def uncapped(self) -> Head:
        """Return the head without its soft-capping."""
        return replace(self, softcap=None)

    def add_logits(self, total: Tensor | None, factor: float, beta: float = 1.0) -> Tensor:
        """Return ``beta · total + factor · logits()``, in place; a linear head adds inside the matrix product.

        With ``beta`` 0, ``total`` may hold anything.
        """
        with torch.autocast(self.hidden.device.type, enabled=False):
            if self.softcap is not None:
                logits_NV = self.logits()
                if total is None or beta == 0.0:
                    return torch.mul(logits_NV, factor, out=logits_NV if total is None else total)
                return (total if beta == 1.0 else total.mul_(beta)).add_(logits_NV, alpha=factor)
            return self._add_uncapped(total, factor, beta)

    def _add_uncapped(self, total: Tensor | None, factor: float, beta: float) -> Tensor:
        products = self.products.on(self.hidden.device)
        # A prepared weight needs no conversion.
        unprepared_VD = self.weight[:0] if self.summands else self.weight
        hidden, weight = operands(self.hidden.detach(), unprepared_VD.detach(), products)
        weight = self.summands or weight
        if total is None:
            total = aligned_rows(len(self.hidden), len(self.weight), self.hidden.new_empty(0, dtype=self.dtype))
            beta = 0.0
        transposed = tuple(part.T for part in weight)
        add_product(total, hidden, transposed, factor * self.scale, beta, tf32=products is Products.TF32)
        if self.bias is not None:
            total.add_(self.bias.detach().to(total.dtype), alpha=factor * self.scale)
        return total

    def _has_graph(self) -> bool:
        return torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (self.hidden, self.weight, self.bias)
        )


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

    def part(self, tokens: slice | Tensor) -> TokenFacts:
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
    def combined(self, coefficients: Mapping[str, float], into: Tensor | None = None) -> Tensor:
        """Return Σ coefficient · logits[role]: [N, V], detached; −inf where a head's bias rules a token out.

        Args:
            coefficients: role -> factor; at least one.
            into: [N, V], overwritten and returned; None: a new tensor.
        """
        total: Tensor | None = None
        # Computed logits first: the other heads' products are then added in place.
        for role in sorted(coefficients, key=lambda role: role not in self._made):
            factor = coefficients[role]
            if role in self._made:
                term = self._made[role]
                total = torch.mul(term, factor, out=into) if total is None else total.add_(term, alpha=factor)
            elif total is None:
                total = self._heads[role].add_logits(into, factor, beta=0.0)
            else:
                total = self._heads[role].add_logits(total, factor)
        assert total is not None, "a sum of no roles"
        for role in coefficients:
            bias = self._heads[role].bias if role in self._heads else None
            if bias is not None:
                total.masked_fill_(torch.isneginf(bias), -torch.inf)
        return total
