"""Divergences D(P, Q) per token, exact over the vocabulary: P the target, Q the student (docs/design.md#divergences).

Each takes two [N, V] log-probs, at least float32, and returns [N] nats; gradients flow to Q. Each is 0 at equality and,
up to rounding, never negative. If a divergence is infinite by definition (forward KL if Q rules out a token that P does
not, reverse KL the other way round, the α-β-divergence of (0, 0) in both cases), the result is +inf, and training stops
with an error that says so. ``LogitMSE`` compares the tokens that neither rules out.

These are the definitions. KLs, the Jensen-Shannon and the skew divergences also have a kernel, which computes them in
training; for all the others autograd differentiates the formula here, chunk by chunk (``deltakd/kernels/chunked.py``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from deltakd.types import MixtureKL

#: Stands for −inf inside a mixture, where log(0 + 0) would have no gradient; e to it is 0 in every float type.
_FLOOR = -1e30


class Divergence(ABC):
    """D(P, Q) ≥ 0 per token, 0 if P = Q. To write your own, subclass it and define ``name`` and ``__call__``."""

    #: The name under which its values are logged.
    name: str
    #: True if the formula is KL(P ‖ Q) itself, so that a kernel may compute it instead.
    is_forward_kl: bool = False
    #: Likewise for KL(Q ‖ P).
    is_reverse_kl: bool = False

    @property
    def as_mixture(self) -> MixtureKL | None:
        """Likewise for KLs to a mixture of P and Q; None: it is something else."""
        return None

    @abstractmethod
    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """[N] nats from two [N, V] log-probs, at least float32."""

    @property
    def whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """As for ``Loss``. None by default: divergences weighted by probability need only likely tokens."""
        return ()

    def _weighs_all_alike(self) -> tuple[str, ...]:
        return (f"{type(self).__name__} weighs all tokens of the vocabulary alike",)


def kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(P ‖ Q) = Σ_v [P (log P − log Q) − P + Q], [N] nats, with gradients to both sides.

    −P + Q sums to 0 but makes each term ≥ 0: at V = 50,000 torch's float32 log_softmax is off its normalisation by
    2e-5, and without −P + Q a KL near 0 would be off by as much.
    """
    p_NV = log_p_NV.exp()
    # If P = 0 the term is 0 in the limit; −inf − (−inf) and 0 · inf would be NaN.
    difference_NV = (log_p_NV - log_q_NV).masked_fill(p_NV == 0, 0.0)
    return (p_NV * difference_NV - p_NV + log_q_NV.exp()).sum(-1)


def log_ratio(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """log A − log B, [N, V] nats; 0 if both rule the token out."""
    return (log_a_NV - log_b_NV).masked_fill(torch.isneginf(log_a_NV) & torch.isneginf(log_b_NV), 0.0)


def log_mixture(weight: float, log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """log(weight · A + (1 − weight) · B) by logsumexp: [N, V], weight in (0, 1)."""
    return torch.logaddexp(
        log_a_NV.clamp_min(_FLOOR) + math.log(weight), log_b_NV.clamp_min(_FLOOR) + math.log1p(-weight)
    )


def _check_weight(value: float, key: str, meaning: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{key} is {value}; it must be between 0 and 1 ({meaning})")


@final
class ForwardKL(Divergence):
    """KL(P ‖ Q): mass-covering, the usual choice (Hinton et al., arXiv 1503.02531).

    This is the definition. In training ``deltakd.kernels.fused.fused_chunk`` computes it, value and gradient by hand,
    if the target is linear in the logits and the student's logits are linear in its hidden states; otherwise autograd
    differentiates the formula here. ``tests/kernels/test_chunked.py`` shows that the two agree, values and gradients:
    ``test_by_hand_in_blocks_of_rows``, ``test_values_and_gradients``, ``test_every_loss_by_name``.
    """

    name = "forward_kl"
    is_forward_kl = True

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        return kl(log_p_NV, log_q_NV)


@final
class ReverseKL(Divergence):
    """KL(Q ‖ P) = Σ Q log(Q / P): mode-seeking (MiniLLM, arXiv 2306.08543; here per token and on given data).

    As for ``ForwardKL``, this is the definition, and a kernel computes it in training where the target is linear.
    """

    name = "reverse_kl"
    is_reverse_kl = True

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        return kl(log_q_NV, log_p_NV)


@final
class SymmetricKL(Divergence):
    """w · KL(P ‖ Q) + (1 − w) · KL(Q ‖ P); at w = ½ half of Jeffreys' divergence.

    Args:
        weight: w in [0, 1].
    """

    name = "symmetric_kl"

    def __init__(self, weight: float = 0.5) -> None:
        _check_weight(weight, "loss.divergence.weight", "1 is forward KL, 0 is reverse KL")
        self.weight = weight

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        # A weight of 0 must not multiply an infinite KL.
        forward_N = self.weight * kl(log_p_NV, log_q_NV) if self.weight > 0 else 0.0
        reverse_N = (1 - self.weight) * kl(log_q_NV, log_p_NV) if self.weight < 1 else 0.0
        total_N = forward_N + reverse_N
        assert isinstance(total_N, Tensor)
        return total_N


@final
class JensenShannon(Divergence):
    """β · KL(P ‖ M) + (1 − β) · KL(Q ‖ M), M = βP + (1 − β)Q (GKD, arXiv 2306.13649, eq. 1).

    Args:
        beta: β in (0, 1).

    Raises:
        ValueError: β is out of range; at 0 and 1 the divergence is identically 0.
    """

    name = "jsd"

    def __init__(self, beta: float = 0.5) -> None:
        if not 0 < beta < 1:
            raise ValueError(
                f"loss.divergence.beta is {beta}; it must be above 0 and below 1. At 0 and 1 the generalised JSD is "
                "identically 0: use loss=kd (forward KL) or loss=kd_reverse instead"
            )
        self.beta = beta

    @property
    def as_mixture(self) -> MixtureKL:
        return MixtureKL(self.beta, 1 - self.beta, self.beta)

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        log_m_NV = log_mixture(self.beta, log_p_NV, log_q_NV)
        return self.beta * kl(log_p_NV, log_m_NV) + (1 - self.beta) * kl(log_q_NV, log_m_NV)


@final
class TotalVariation(Divergence):
    """½ Σ |P − Q|, in [0, 1] (f-distill, arXiv 2307.15190); its gradient jumps at P = Q."""

    name = "tvd"

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """[N]; a probability, not nats."""
        return 0.5 * (log_p_NV.exp() - log_q_NV.exp()).abs().sum(-1)


class _SkewKL(Divergence):
    """KL(A ‖ λA + (1 − λ)B). The two classes below differ only in which of P and Q is A."""

    def __init__(self, skew: float = 0.1) -> None:
        if not 0 <= skew < 1:
            raise ValueError(
                f"loss.divergence.skew is {skew}; it must be at least 0 (plain KL) and below 1, where it is "
                "identically 0"
            )
        self.skew = skew

    def _skewed(self, log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
        return kl(log_a_NV, log_mixture(self.skew, log_a_NV, log_b_NV) if self.skew > 0 else log_b_NV)


@final
class SkewForwardKL(_SkewKL):
    """KL(P ‖ λP + (1 − λ)Q) (DistiLLM, arXiv 2402.03898, eq. 3).

    Args:
        skew: λ in [0, 1); 0 is forward KL.
    """

    name = "skew_forward_kl"

    @property
    def as_mixture(self) -> MixtureKL | None:
        return MixtureKL(1.0, 0.0, self.skew) if self.skew > 0 else None

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        return self._skewed(log_p_NV, log_q_NV)


@final
class SkewReverseKL(_SkewKL):
    """KL(Q ‖ (1 − λ)P + λQ) (DistiLLM, arXiv 2402.03898, eq. 4).

    Args:
        skew: λ in [0, 1); 0 is reverse KL.
    """

    name = "skew_reverse_kl"

    @property
    def as_mixture(self) -> MixtureKL | None:
        return MixtureKL(0.0, 1.0, 1 - self.skew) if self.skew > 0 else None

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        return self._skewed(log_q_NV, log_p_NV)


@final
class AdaptiveKL(Divergence):
    """g_h/(g_h + g_t) · KL(P ‖ Q) + g_t/(g_h + g_t) · KL(Q ‖ P) (AKL, arXiv 2404.02657).

    g_h and g_t are Σ |P − Q| over the head (the most likely tokens of P up to a mass, at least one token) and over the
    tail, both detached. At equality each weight is ½.

    Args:
        head_mass: the head's mass, in (0, 1).
    """

    name = "adaptive_kl"

    def __init__(self, head_mass: float = 0.5) -> None:
        if not 0 < head_mass < 1:
            raise ValueError(f"loss.divergence.head_mass is {head_mass}; it must be above 0 and below 1")
        self.head_mass = head_mass

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        head_N, tail_N = self._weights(log_p_NV, log_q_NV)
        # A weight of 0 must not multiply an infinite KL: Q may rule out a tail whose gap is 0 up to rounding.
        forward_N = (head_N * kl(log_p_NV, log_q_NV)).masked_fill(head_N == 0, 0.0)
        return forward_N + tail_N * kl(log_q_NV, log_p_NV)

    @torch.no_grad()
    def _weights(self, log_p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
        p_NV, order_NV = log_p_NV.exp().sort(stable=True, dim=-1, descending=True)
        gap_NV = (p_NV - log_q_NV.exp().gather(-1, order_NV)).abs()
        in_head_NV = p_NV.cumsum(-1) <= self.head_mass
        in_head_NV[:, 0] = True
        # Not 1 − head: if the tail's gap is 0, rounding could leave a tiny weight for an infinite KL.
        head_N, tail_N = (gap_NV * in_head_NV).sum(-1), (gap_NV * ~in_head_NV).sum(-1)
        gap_N = head_N + tail_N
        return torch.where(gap_N > 0, head_N / gap_N, 0.5), torch.where(gap_N > 0, tail_N / gap_N, 0.5)


@final
class ToDi(Divergence):
    """Σ_v [w P log(P/Q) + (1 − w) Q log(Q/P)], w = sg σ(log P/Q) for each token of the vocabulary (arXiv 2505.16297).

    σ is the sigmoid, sg detaches. The value equals KL(P ‖ Q) + KL(Q ‖ P); the gradient does not, since w is detached.
    """

    name = "todi"

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
        ratio_NV = (log_p_NV - log_q_NV).masked_fill((p_NV == 0) & (q_NV == 0), 0.0)
        w_NV = ratio_NV.detach().sigmoid()
        # If P (or Q) is 0, so is its term; 0 · ∞ must not be computed.
        forward_NV = (w_NV * p_NV) * ratio_NV.masked_fill(p_NV == 0, 0.0)
        reverse_NV = ((1 - w_NV) * q_NV) * ratio_NV.masked_fill(q_NV == 0, 0.0)
        return (forward_NV - reverse_NV).sum(-1)


@final
class AlphaBeta(Divergence):
    """−1/(αβ) Σ [P^α Q^β − α/(α+β) P^(α+β) − β/(α+β) Q^(α+β)] (ABKD, arXiv 2505.04560), with its limits.

    (1, 0) is forward KL, (0, 1) reverse KL, (0, 0) ½ Σ (log P − log Q)².

    Args:
        alpha: α ≥ 0.
        beta: β ≥ 0. Each is 0 or between 0.05 and 2: closer to 0, float32 cancels; use the limit itself.

    Raises:
        ValueError: α or β is out of range.
    """

    name = "alpha_beta"

    def __init__(self, alpha: float = 0.2, beta: float = 0.7) -> None:
        problems = [
            f"loss.divergence.{key} is {value}; it must be 0 (the limit) or between 0.05 and 2"
            for key, value in (("alpha", alpha), ("beta", beta))
            if value != 0 and not 0.05 <= value <= 2
        ]
        if problems:
            raise ValueError("; ".join(problems))
        self.alpha, self.beta = float(alpha), float(beta)

    @property
    def whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """At (0, 0) every token has the same weight."""
        return self._weighs_all_alike() if self.alpha == self.beta == 0 else ()

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """[N]; nats in the limits (1, 0) and (0, 1)."""
        a, b = self.alpha, self.beta
        if a == 0 and b == 0:
            return 0.5 * log_ratio(log_p_NV, log_q_NV).square().sum(-1)
        if b == 0:
            return _one_power(a, log_p_NV, log_q_NV)
        if a == 0:
            return _one_power(b, log_q_NV, log_p_NV)
        mixed_NV = (a * log_p_NV + b * log_q_NV).exp()
        p_NV, q_NV = ((a + b) * log_p_NV).exp(), ((a + b) * log_q_NV).exp()
        far_NV = (a * p_NV + b * q_NV) / (a + b) - mixed_NV
        # If P is close to Q, the three terms cancel. With P^α Q^β factored out the sum is exact for small log-ratios.
        is_near_NV, r_NV = _near(log_p_NV, log_q_NV, 1.0)
        near_NV = mixed_NV * (a * torch.expm1(b * r_NV) + b * torch.expm1(-a * r_NV)) / (a + b)
        return torch.where(is_near_NV, near_NV, far_NV).sum(-1) / (a * b)


def _one_power(power: float, log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """1/c² Σ [A^c log(A^c / B^c) − A^c + B^c]: the limit of the family as the other power goes to 0."""
    a_NV, b_NV = (power * log_a_NV).exp(), (power * log_b_NV).exp()
    difference_NV = (log_a_NV - log_b_NV).masked_fill(a_NV == 0, 0.0)
    far_NV = a_NV * power * difference_NV - a_NV + b_NV
    is_near_NV, r_NV = _near(log_a_NV, log_b_NV, 1.0 / power)
    near_NV = a_NV * (power * r_NV + torch.expm1(-power * r_NV))
    return torch.where(is_near_NV, near_NV, far_NV).sum(-1) / power**2


def _near(log_a_NV: Tensor, log_b_NV: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """The mask |log A − log B| < bound, and the log-ratio inside it; 0 outside, so that the unused branch is finite."""
    ratio_NV = log_a_NV - log_b_NV
    is_near_NV = ratio_NV.abs() < bound
    return is_near_NV, ratio_NV.masked_fill(~is_near_NV, 0.0)


@final
class LogitMSE(Divergence):
    """Var_v(z_target − z_student): the mean over the vocabulary of the squared centred logit difference.

    The limit of 2τ² · KL as τ grows (Kim et al., arXiv 2105.08919, compare the two). Mean and centre are over the
    possible tokens: those with a finite logit on both sides.
    """

    name = "logit_mse"

    @property
    def whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """Every token has the same weight."""
        return self._weighs_all_alike()

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """[N]; squared logits, not nats."""
        ruled_out_NV = torch.isneginf(log_p_NV) | torch.isneginf(log_q_NV)
        count_N1 = (~ruled_out_NV).sum(-1, keepdim=True).clamp_min(1)
        difference_NV = (log_p_NV - log_q_NV).masked_fill(ruled_out_NV, 0.0)
        mean_N1 = difference_NV.sum(-1, keepdim=True) / count_N1
        centred_NV = (difference_NV - mean_N1).masked_fill(ruled_out_NV, 0.0)
        return (centred_NV.square() / count_N1).sum(-1)
