"""Universal logit distillation: sorted probabilities, whatever their tokens (docs/design.md#two-tokenizers)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from deltakd.losses.mixing import tempered, tempered_student
from deltakd.losses.span_mixture import SpanMixture
from deltakd.losses.spans import at_last_tokens, sides_of, sorted_distance, tokens_of
from deltakd.types import TEACHER, AlignedTokens, Alignment

PAIRINGS = ("position", "span")


@final
class UniversalLogitDistillation(SpanMixture):
    """λ · CE(labels) + (1 − λ) · Σ_i |p_(i) − q_(i)|, probabilities in descending order (ULD, arXiv 2402.12030).

    Args:
        pairing: which predictions are compared. ``position``, as published: the i-th token of a response with the i-th
            on the other side, up to the end of the shorter one. ``span``: where both sides have read the same text, at
            the start of each span.
        temperature: τ.
        ce_weight: λ. The paper's CE + 1.5 · ULD is, up to a factor, λ = 0.4.
        temperature_squared: multiply the term by τ².

    Raises:
        ValueError: the pairing is unknown, or a number is out of range.
    """

    def __init__(
        self,
        pairing: str = "position",
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, ce_weight, temperature_squared)
        if pairing not in PAIRINGS:
            raise ValueError(f"loss.pairing is {pairing!r}; allowed: {', '.join(PAIRINGS)}")
        self.pairing = pairing

    @property
    def term_requires(self) -> frozenset[str]:
        """The teacher."""
        return frozenset({TEACHER})

    def aligned(self, tokens: AlignedTokens) -> AlignedTokens:
        """Pair the tokens by position if asked to."""
        if self.pairing == "span":
            return tokens
        return tokens.with_alignment(by_position(tokens.student.rows, tokens.other.rows))

    def term(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The distance at the first token of each span, laid on its last: [N]."""
        student, other = sides_of(tokens_of(logits).alignment)
        q_KV = tempered_student(log_student_NV[student.start], self.temperature).exp()
        p_KV = tempered(logits[TEACHER].detach()[other.start], self.temperature).exp()
        value_N = at_last_tokens(sorted_distance(p_KV, q_KV), student, len(log_student_NV))
        return value_N, {"uld": value_N}


def by_position(rows_N: Tensor, other_rows_M: Tensor) -> Alignment:
    """Pair the i-th token of each row with the i-th on the other side; the rest of the longer side stays unaligned.

    Args:
        rows_N, other_rows_M: int64, ascending: the row of each token.
    """
    rows = [side.cpu() for side in (rows_N, other_rows_M)]
    count = 1 + max((int(side[-1]) for side in rows if len(side)), default=-1)
    lengths = [torch.bincount(side, minlength=count) for side in rows]
    shorter_B = torch.minimum(*lengths)
    first_B = shorter_B.cumsum(0) - shorter_B
    spans = []
    for side, length_B in zip(rows, lengths, strict=True):
        place = torch.arange(len(side)) - (length_B.cumsum(0) - length_B)[side]
        spans.append(torch.where(place < shorter_B[side], first_B[side] + place, -1))
    return Alignment.of(spans[0], spans[1]).to(rows_N.device)
