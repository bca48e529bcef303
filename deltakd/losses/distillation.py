"""Distillation: cross-entropy of the labels, mixed with a divergence to a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from deltakd.losses.divergences import Divergence
from deltakd.losses.mixing import LabelMixture, tempered, tempered_student
from deltakd.losses.targets import ReadsTarget, Target
from deltakd.types import LinearKL, require_kind


@final
class Distillation(ReadsTarget, LabelMixture):
    """λ · CE(labels) + (1 − λ) · D(target, student), per token (arXiv 2509.14526; docs/design.md#delta-kd).

    D is between softmax(z_target / τ), detached, and softmax(z_student / τ).

    With a KL, a Jensen-Shannon or a skew divergence and a target that is linear in the logits (``Target.coefficients``,
    ``Target.gate``), ``deltakd.kernels.fused.fused_chunk`` computes the whole loss in training;
    ``tests/kernels/test_chunked.py`` shows that the two agree, values and gradients (``test_every_loss_by_name``).

    Args:
        target: what to match.
        divergence: measures the student's distance from it.
        temperature: τ.
        ce_weight: λ.
        temperature_squared: multiply the distillation term by τ².

    Raises:
        ValueError: a part is not of its base class, or a number is out of range.
    """

    def __init__(
        self,
        target: Target,
        divergence: Divergence,
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, ce_weight, temperature_squared)
        require_kind(target, Target, "loss.target")
        require_kind(divergence, Divergence, "loss.divergence")
        self.target = target
        self.divergence = divergence

    @property
    def term_requires(self) -> frozenset[str]:
        return self.target.requires

    @property
    def needs_alignment(self) -> bool:  # type: ignore[override]
        """True if the target does, unless λ = 1."""
        return self.ce_weight < 1.0 and self.target.needs_alignment

    @property
    def term_whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """Reasons of the target and of the divergence; a gate reads probabilities at τ = 1."""
        reasons = self.target.whole_vocabulary_reasons + self.divergence.whole_vocabulary_reasons
        if self.target.gate is None or self.temperature == 1.0:
            return reasons
        return (*reasons, f"a gate needs log-probs at temperature 1, and loss.temperature is {self.temperature:g}")

    def _fused_term(self) -> LinearKL | None:
        coefficients = self.target.coefficients
        measure = self.divergence
        mixture = measure.as_mixture
        if coefficients is None or not (measure.is_forward_kl or measure.is_reverse_kl or mixture):
            return None
        scale = self.temperature**2 if self.temperature_squared else 1.0
        options = (self.temperature, self.ce_weight, scale, measure.name, measure.is_reverse_kl, self.target.gate)
        return LinearKL(coefficients, *options, mixture)

    def term(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """D(target, student): [N], under the divergence's name, and what the target logs."""
        target_NV, parts = self.target.with_parts(logits)
        divergence_N = _divergence(target_NV, self.divergence, self.temperature, log_student_NV)
        return divergence_N, {self.divergence.name: divergence_N, **parts}


def divergence_to(
    target: Target, divergence: Divergence, temperature: float, logits: Mapping[str, Tensor], log_student_NV: Tensor
) -> Tensor:
    """D(target, student) at τ: [N] nats."""
    return _divergence(target(logits), divergence, temperature, log_student_NV)


def _divergence(target_NV: Tensor, divergence: Divergence, temperature: float, log_student_NV: Tensor) -> Tensor:
    log_p_NV = tempered(target_NV, temperature)
    log_q_NV = tempered_student(log_student_NV, temperature)
    return divergence(log_p_NV, log_q_NV)
