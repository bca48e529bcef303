"""Divergences D(P, Q) per token, exact over the vocabulary: P the target, Q the student (DESIGN 3.3)."""

from __future__ import annotations

from typing import Protocol, final

from torch import Tensor


class Divergence(Protocol):
    """D(P, Q) ≥ 0 per token, 0 where P = Q."""

    name: str

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """[N] nats from two [N, V] log-probs, at least float32."""
        ...


@final
class ForwardKL:
    """KL(P ‖ Q) = Σ_v P (log P − log Q), with the entropy term kept, so that it is 0 at equality."""

    name = "forward_kl"

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """[N] nats from two [N, V] log-probs."""
        p_NV = log_p_NV.exp()
        # Where P = 0 the term is 0 by its limit; −inf − (−inf) and 0 · inf would give NaN.
        difference_NV = (log_p_NV - log_q_NV).masked_fill(p_NV == 0, 0.0)
        return (p_NV * difference_NV).sum(-1)
