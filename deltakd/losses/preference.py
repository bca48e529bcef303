"""Preference of the data's response over the student's own (DPKD, arXiv 2406.19774; docs/design.md#on-policy)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from deltakd.losses.sampled import check_numbers, of_labels, with_gain
from deltakd.losses.sequence_target import TargetSequenceLoss
from deltakd.losses.targets import Target
from deltakd.types import (
    STUDENT,
    HeadLogits,
    LossOutput,
    PairFacts,
    TokenFacts,
    at_least_float32,
)


@final
class ResponsePreference(TargetSequenceLoss):
    """λ · CE(given) + (1 − λ) · −log σ(β [r(given) − r(own)]), r(y) = log π_θ(y) − log target(y).

    ``given`` is the response in the data, ``own`` the student's to the same prompt, and r, the implicit reward, a sum
    over the tokens of a response. The preference term is a mean over the pairs of an optimiser step, the cross-entropy
    a mean over the tokens of its given responses. No gradient goes through the sampling.

    Without pairs, which validation has not, the loss is the cross-entropy alone.

    Args:
        target: takes the teacher's part in r; the teacher in the paper.
        ce_weight: λ in [0, 1].
        beta: β > 0.
        length_normalised: r is the mean over a response's tokens, not the sum.

    Raises:
        ValueError: the target is not one, or a number is out of range.
    """

    needs_pairs = True

    def __init__(
        self, target: Target, ce_weight: float = 0.5, beta: float = 0.1, length_normalised: bool = False
    ) -> None:
        super().__init__(target, ce_weight)
        check_numbers(ce_weight, None, beta=beta)
        self.beta = float(beta)
        self.length_normalised = length_normalised

    @property
    def whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """A token of a response may be outside the K."""
        return () if self.ce_weight == 1.0 else ("a preference scores the tokens of the responses by themselves",)

    @torch.no_grad()
    def token_rewards(self, logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """[N] nats: log π_θ − log target of the label."""
        log_pi_N = of_labels(at_least_float32(logits[STUDENT]).log_softmax(-1), labels)
        if self.ce_weight == 1.0 or (isinstance(logits, HeadLogits) and logits.facts.pairs is None):
            return torch.zeros_like(log_pi_N)
        return log_pi_N - of_labels(self.target(logits).log_softmax(-1), labels)

    @torch.no_grad()
    def sequence_weights(self, rewards: Tensor, facts: TokenFacts) -> Tensor:
        """[N, 3]: the margin r(given) − r(own) of the token's pair, its derivative by log π, and 1 / the pair's tokens.

        Zeros without pairs.
        """
        if facts.pairs is None:
            return rewards.new_zeros(len(rewards), 3)
        return torch.stack(_margins(rewards, facts.pairs, self.length_normalised), dim=1)

    def __call__(self, logits: Mapping[str, Tensor], labels: Tensor) -> LossOutput:
        """Score N tokens of given and own responses.

        Args:
            logits: role -> [N, V] float, for ``student`` and every role in ``requires``. ``HeadLogits`` know pairs and
                weights; with plain mappings the loss is the cross-entropy.
            labels: [N] int64.

        Returns:
            per_token [N] nats, which over an optimiser step sum to the loss times its tokens; parts, likewise: ``ce``
            of the given responses, and with pairs ``preference``, ``margin`` (β times it) and ``preferred``, the share
            of pairs with a margin above 0.
        """
        log_pi_N = of_labels(at_least_float32(logits[STUDENT]).log_softmax(-1), labels)
        facts = logits.facts if isinstance(logits, HeadLogits) else TokenFacts()
        if facts.pairs is None:
            return LossOutput(-log_pi_N, {"ce": -log_pi_N})
        ce_N = -log_pi_N * facts.pairs.given * facts.pairs.tokens_per_given
        if self.ce_weight == 1.0 or facts.weights is None:
            return LossOutput(ce_N, {"ce": ce_N})
        margin_N, slope_N, share_N = facts.weights.unbind(1)
        share_N = share_N * facts.pairs.tokens_per_pair
        value_N = F.softplus(-self.beta * margin_N) * share_N
        force_N = self.beta * torch.sigmoid(-self.beta * margin_N) * slope_N * facts.pairs.tokens_per_pair
        term_N = with_gain(value_N, force_N * log_pi_N)
        per_token_N = (1 - self.ce_weight) * term_N
        if self.ce_weight > 0:
            per_token_N = per_token_N + self.ce_weight * ce_N
        preferred_N = (margin_N > 0) * share_N
        parts = {"ce": ce_N, "preference": value_N, "margin": self.beta * margin_N * share_N, "preferred": preferred_N}
        return LossOutput(per_token_N, parts)


def _margins(rewards_N: Tensor, pairs: PairFacts, by_mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``sequence_weights`` stacks, [N] each."""
    # Of pair i, response 2i is the given one and 2i + 1 the student's.
    response_N = 2 * pairs.numbers + (~pairs.given).long()
    count = 2 * (int(pairs.numbers.max()) + 1) if len(rewards_N) else 0
    # In float64: long responses sum to numbers whose difference is small.
    sums = torch.zeros(count, dtype=torch.float64, device=rewards_N.device)
    sums.index_add_(0, response_N, rewards_N.double())
    lengths = torch.bincount(response_N, minlength=count)
    sign_N = torch.where(pairs.given, 1.0, -1.0).to(rewards_N.dtype)
    if by_mean:
        sums = sums / lengths.clamp_min(1)
        sign_N = sign_N / lengths[response_N]
    margin = (sums[0::2] - sums[1::2]).to(rewards_N.dtype)
    tokens = lengths[0::2] + lengths[1::2]
    return margin[pairs.numbers], sign_N, 1.0 / tokens[pairs.numbers].to(rewards_N.dtype)
