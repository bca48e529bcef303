"""Distillation over merged spans, as TRL's GOLD has it (docs/design.md#two-tokenizers)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from deltakd.losses.divergences import Divergence
from deltakd.losses.mixing import tempered, tempered_student
from deltakd.losses.sampled import of_labels
from deltakd.losses.span_mixture import SpanMixture
from deltakd.losses.spans import Side, at_last_tokens, sides_of, sorted_distance, tokens_of
from deltakd.types import TEACHER, require_kind

MERGES = ("first", "last")


@final
class SpanDistillation(SpanMixture):
    """λ · CE(labels) + (1 − λ) · Σ_spans [w · D(shared tokens) + (1 − w) · ULD(the rest)].

    The distributions of a span's tokens are merged into one by the chain rule: the next-token distribution at one of
    its tokens, times the probabilities of its other tokens. D then compares the tokens that both vocabularies have, and
    sorted probabilities the rest. This is TRL's GOLD (``ULDLoss`` with ``use_extended_uld`` and
    ``uld_use_hybrid_loss``), with these differences:

    * Probabilities of the shared tokens need not sum to 1. GOLD's KL leaves out the −P + Q that then keeps a KL ≥ 0 and
      puts its minimum where both agree; ours has it (``deltakd.losses.divergences.kl``). A JSD has the same value.
    * The distribution at a token predicts that token. GOLD's ``observed`` reads the one after it.
    * Tokens are shared if their bytes are equal, and log-probs are not cut off at 1e-8.

    Args:
        divergence: D, on the probabilities of the shared tokens.
        merge: the token whose distribution a span keeps: ``first`` (GOLD: observed), where both sides have read the
            same text, or ``last`` (GOLD: bayesian).
        shared_weight: w in [0, 1]; None: the share of the teacher's tokens that the student has, too.
        temperature: τ.
        ce_weight: λ.
        temperature_squared: multiply the term by τ².

    Raises:
        ValueError: a number is out of range, the merge is unknown, or the divergence is none.
    """

    def __init__(
        self,
        divergence: Divergence,
        merge: str = "first",
        shared_weight: float | None = None,
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, ce_weight, temperature_squared)
        require_kind(divergence, Divergence, "loss.divergence")
        problems = [f"loss.merge is {merge!r}; allowed: {', '.join(MERGES)}"] if merge not in MERGES else []
        if shared_weight is not None and not 0 <= shared_weight <= 1:
            problems.append(
                f"loss.shared_weight is {shared_weight}; it must be between 0 (sorted probabilities only) and 1 "
                "(shared tokens only), or null for the share of the teacher's tokens that the student has"
            )
        if problems:
            raise ValueError("; ".join(problems))
        self.divergence = divergence
        self.merge = merge
        self.shared_weight = shared_weight

    @property
    def term_requires(self) -> frozenset[str]:
        """The teacher."""
        return frozenset({TEACHER})

    def term(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Each span's value, laid on its last token: [N]; so the mean over tokens counts each span once."""
        tokens = tokens_of(logits)
        student, other = sides_of(tokens.alignment)
        log_q_NV = tempered_student(log_student_NV, self.temperature)
        log_p_MV = tempered(logits[TEACHER].detach(), self.temperature)
        log_q_KV = self._merged(log_q_NV, tokens.student.labels, student)
        log_p_KV = self._merged(log_p_MV, tokens.other.labels, other)
        token_map = tokens.token_map
        shared_K = self.divergence(log_p_KV[:, token_map.other_shared], log_q_KV[:, token_map.student_shared])
        rest_K = _distance(log_p_KV[:, token_map.other_rest], log_q_KV[:, token_map.student_rest])
        weight = self.shared_weight
        if weight is None:
            weight = len(token_map.other_shared) / log_p_KV.shape[1]
        parts = {
            self.divergence.name: at_last_tokens(shared_K, student, len(log_student_NV)),
            "uld": at_last_tokens(rest_K, student, len(log_student_NV)),
        }
        return weight * parts[self.divergence.name] + (1 - weight) * parts["uld"], parts

    def _merged(self, log_p_NV: Tensor, labels_N: Tensor, side: Side) -> Tensor:
        """Return log probabilities [K, V] of a span's one distribution, times those of its other tokens."""
        first = self.merge == "first"
        base_KV = log_p_NV[side.start if first else side.stop - 1]
        if side.longest <= 1:
            return base_KV
        others_K = side.sums(of_labels(log_p_NV, labels_N), skip_first=first, skip_last=not first)
        return base_KV + others_K[:, None]


def _distance(log_p_KV: Tensor, log_q_KV: Tensor) -> Tensor:
    """Return [K] the distance of sorted probabilities; as published, 0 if one side has no such tokens."""
    if 0 in (log_p_KV.shape[1], log_q_KV.shape[1]):
        return log_q_KV.new_zeros(len(log_q_KV))
    return sorted_distance(log_p_KV.exp(), log_q_KV.exp())
