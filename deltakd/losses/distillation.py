"""Distillation: cross-entropy of the labels mixed with a divergence to a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from deltakd.losses.divergences import Divergence
from deltakd.losses.sft import cross_entropy
from deltakd.losses.targets import Target, compose
from deltakd.types import STUDENT, LossOutput, at_least_float32


@final
class Distillation:
    """λ · CE(labels) + (1 − λ) · D(target, student), per token (arXiv 2509.14526; DESIGN 3.1).

    CE is always at τ = 1; D is between softmax(z_target / τ) and softmax(z_student / τ). The target is detached.

    Args:
        target: what to match.
        divergence: how far from it.
        temperature: τ > 0.
        ce_weight: λ in [0, 1]. At 1 the divergence is not computed and no reference is read: that is SFT.
        temperature_squared: multiply D by τ², which keeps its gradient's size as τ grows (off by default).

    Raises:
        ValueError: temperature or ce_weight out of range.
    """

    def __init__(
        self,
        target: Target,
        divergence: Divergence,
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        temperature_squared: bool = False,
    ) -> None:
        problems = []
        if not (0 < temperature < float("inf")):
            problems.append(f"loss.temperature is {temperature}; it must be a finite number above 0")
        if not (0 <= ce_weight <= 1):
            problems.append(f"loss.ce_weight is {ce_weight}; it must be between 0 (no labels) and 1 (labels only)")
        if problems:
            raise ValueError("; ".join(problems))
        self.target = target
        self.divergence = divergence
        self.temperature = float(temperature)
        self.ce_weight = float(ce_weight)
        self.temperature_squared = temperature_squared

    @property
    def requires(self) -> frozenset[str]:
        """The roles that the target reads; none where λ = 1."""
        return frozenset() if self.ce_weight == 1.0 else frozenset(self.target.coefficients)

    def __call__(self, logits: Mapping[str, Tensor], labels: Tensor) -> LossOutput:
        """Score N tokens.

        Args:
            logits: role -> [N, V] float, for ``student`` and every role in ``requires``.
            labels: [N] int64.

        Returns:
            per_token [N] nats; parts ``ce`` (at τ = 1) and the divergence's name (without λ and τ²).
        """
        student_NV = at_least_float32(logits[STUDENT])
        ce_N = cross_entropy(student_NV, labels)
        if self.ce_weight == 1.0:
            return LossOutput(ce_N, {"ce": ce_N})
        target_NV = compose(self.target.coefficients, logits)
        log_p_NV = (target_NV / self.temperature).log_softmax(-1)
        log_q_NV = (student_NV / self.temperature).log_softmax(-1)
        divergence_N = self.divergence(log_p_NV, log_q_NV)
        scale = self.temperature**2 if self.temperature_squared else 1.0
        # λ = 0 must not multiply an infinite CE by 0.
        per_token_N = (1 - self.ce_weight) * scale * divergence_N
        if self.ce_weight > 0:
            per_token_N = self.ce_weight * ce_N + per_token_N
        return LossOutput(per_token_N, {"ce": ce_N, self.divergence.name: divergence_N})
