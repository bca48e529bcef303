"""Reverse KL between whole responses (MiniLLM, arXiv 2306.08543; docs/design.md#on-policy)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from deltakd.losses.divergences import kl
from deltakd.losses.sampled import (
    check_numbers,
    of_labels,
    policy_gain,
    sampled_log_probs,
    watched,
    with_gain,
    with_labels,
)
from deltakd.losses.sequence_target import TargetSequenceLoss
from deltakd.losses.targets import Target
from deltakd.types import (
    STUDENT,
    HeadLogits,
    LossOutput,
    TokenFacts,
    at_least_float32,
)


@final
class SequenceReverseKL(TargetSequenceLoss):
    """λ · CE + (1 − λ) · [KL(π_θ ‖ target) per token − R ∇log π_θ(label)], on responses that the student sampled.

    KL(π_θ ‖ target) between distributions of whole responses is the expected sum over t of r_t = log π_θ(y_t) − log
    target(y_t). Its gradient has two parts (equation 3 of the paper): that of each token's own KL, which is exact over
    the vocabulary, and a policy gradient for what a token does to those after it, whose advantage R is −Σ r over the
    later tokens of the response; with ``length_normalised`` their mean, as in equation 6. The value is the KL per
    token.

    Where one round of responses serves several optimiser steps, the second part takes clipped ratios, as
    ``PolicyGradient`` does.

    Args:
        target: the student's target; the teacher in the paper.
        ce_weight: λ in [0, 1].
        length_normalised: divide R by the number of later tokens.
        reward_clip: bound on |r| in nats in R, or None.
        ratio_clip: as for ``PolicyGradient``.

    Raises:
        ValueError: the target is not one, or a number is out of range.
    """

    needs_sampled_tokens = True

    def __init__(
        self,
        target: Target,
        ce_weight: float = 0.0,
        length_normalised: bool = True,
        reward_clip: float | None = None,
        ratio_clip: float | None = 0.2,
    ) -> None:
        super().__init__(target, ce_weight)
        check_numbers(ce_weight, ratio_clip, reward_clip=reward_clip)
        self.length_normalised = length_normalised
        self.reward_clip = reward_clip
        self.ratio_clip = ratio_clip
        self.has_unbounded_ratios = ratio_clip is None

    @property
    def whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """A sampled token may be outside the K."""
        return () if self.ce_weight == 1.0 else ("a policy gradient scores the sampled token by itself",)

    @torch.no_grad()
    def token_rewards(self, logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """[N] nats: −r_t, how much likelier the label is to the target than to the student."""
        if self.ce_weight == 1.0:
            return at_least_float32(logits[STUDENT]).new_zeros(len(labels))
        of_target_N = of_labels(self.target(logits).log_softmax(-1), labels)
        rewards_N = of_target_N - of_labels(at_least_float32(logits[STUDENT]).log_softmax(-1), labels)
        return rewards_N if self.reward_clip is None else rewards_N.clamp(-self.reward_clip, self.reward_clip)

    @torch.no_grad()
    def sequence_weights(self, rewards: Tensor, facts: TokenFacts) -> Tensor:
        """[N] nats: R, the sum (or the mean) of the rewards of each row's later tokens; 0 for its last token."""
        assert facts.rows is not None, "checked by chunked_loss"
        later_N, count_N = sums_of_later(rewards, facts.rows)
        return later_N / count_N.clamp_min(1) if self.length_normalised else later_N

    def __call__(self, logits: Mapping[str, Tensor], labels: Tensor) -> LossOutput:
        """Score N sampled tokens.

        Args:
            logits: role -> [N, V] float, for ``student`` and every role in ``requires``. Without weights (plain
                mappings), the second part of the gradient is left out.
            labels: [N] int64, the sampled tokens.

        Returns:
            per_token [N] nats; parts: ``ce``, ``reverse_kl``, those of ``watched``, and with weights ``advantage`` and
            ``advantage_square``.
        """
        log_student_NV = at_least_float32(logits[STUDENT]).log_softmax(-1)
        log_pi_N = of_labels(log_student_NV, labels)
        if self.ce_weight == 1.0:
            return LossOutput(-log_pi_N, {"ce": -log_pi_N})
        # First: it keeps the teacher's logits, and the target then takes these instead of multiplying its head again.
        seen = watched(logits, log_student_NV.detach(), self.requires)
        kl_N = kl(log_student_NV, self.target(logits).log_softmax(-1))
        term_N, parts = kl_N, {"ce": -log_pi_N, "reverse_kl": kl_N, **seen}
        weights_N = logits.facts.weights if isinstance(logits, HeadLogits) else None
        if weights_N is not None:
            gain_N = policy_gain(weights_N, log_pi_N, sampled_log_probs(logits), self.ratio_clip)
            term_N = with_gain(kl_N, gain_N)
            parts |= {"advantage": weights_N, "advantage_square": weights_N.square()}
        return LossOutput(with_labels(term_N, log_pi_N, self.ce_weight), parts)


def sums_of_later(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each token, the sum of the values of its row's later tokens, and their number: [N] each.

    Args:
        values: [N].
        rows: [N] int64, ascending.
    """
    # Sums to the end of all tokens, minus the part beyond the row; in float64, since rows cancel.
    from_here_N = values.double().flip(0).cumsum(0).flip(0)
    ends_N = torch.searchsorted(rows, rows, right=True)
    beyond_N = torch.cat([from_here_N, from_here_N.new_zeros(1)])[ends_N]
    places_N = torch.arange(len(rows), device=rows.device)
    return (from_here_N - values.double() - beyond_N).to(values.dtype), ends_N - places_N - 1
