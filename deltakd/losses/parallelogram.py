"""Several distributions at once: the Parallelogram Loss and its signed variant (docs/design.md#parallel).

The paper (arXiv 2509.14526) names a Parallelogram Loss, but we could not obtain its formula: both are our
reconstructions. They have no kernel; autograd differentiates them chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from deltakd.losses.distillation import divergence_to
from deltakd.losses.divergences import Divergence, kl
from deltakd.losses.mixing import LabelMixture, tempered, tempered_student
from deltakd.losses.schedules import ScheduleSetting, is_zero, make_schedule, moving
from deltakd.losses.targets import ShiftedTarget, delta_target, shift_target
from deltakd.losses.treatments import NO_TREATMENT, Treatment
from deltakd.types import STUDENT_RAW, TEACHER, TEACHER_RAW, Schedule, require_kind


@final
class Parallelogram(LabelMixture):
    """λ · CE + (1 − λ) · Σ_i w_i · D(corner_i, student): the Parallelogram Loss.

    The corners are the teacher, the raw student, the delta target and the shift target (docs/design.md#parallel).
    Since w ≥ 0, the loss is bounded below whenever its divergence is.

    Args:
        weights: corner (``teacher``, ``student_raw``, ``delta``, ``shift``) -> w. They are divided by their sum; a
            corner of weight 0 is not read.
        divergence: D.
        delta_weight: α of the delta target and β of the shift target.
        treatment: of the shifts in both.
        temperature: τ.
        ce_weight: λ.
        temperature_squared: multiply the distillation term by τ².

    Raises:
        ValueError: a corner is unknown, a weight is negative, the weights sum to 0, or ``divergence`` is no Divergence.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        divergence: Divergence,
        delta_weight: ScheduleSetting = 1.0,
        treatment: Treatment = NO_TREATMENT,
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, ce_weight, temperature_squared)
        require_kind(divergence, Divergence, "loss.divergence")
        self._delta_weight = make_schedule(delta_weight, "delta_weight")
        corners = {
            "teacher": ShiftedTarget(TEACHER),
            "student_raw": ShiftedTarget(STUDENT_RAW),
            "delta": delta_target(self._delta_weight, treatment),
            "shift": shift_target(self._delta_weight, treatment),
        }
        self.corners = _weighted(corners, weights)
        self.divergence = divergence

    @property
    def term_requires(self) -> frozenset[str]:
        return frozenset().union(*(target.requires for _, target in self.corners.values()))

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The delta weight, if it changes."""
        return moving(delta_weight=self._delta_weight)

    @property
    def teacher_factor(self) -> float:
        """That of the corner that has the largest."""
        return max(target.teacher_factor for _, target in self.corners.values())

    @property
    def term_whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """Reasons of the divergence and of the corners."""
        corners = (reason for _, target in self.corners.values() for reason in target.whole_vocabulary_reasons)
        return (*self.divergence.whole_vocabulary_reasons, *corners)

    def term(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ w D: [N]; each D under ``<divergence>_<corner>``."""
        total_N: Tensor | float = 0.0
        parts = {}
        for name, (weight, target) in self.corners.items():
            value_N = divergence_to(target, self.divergence, self.temperature, logits, log_student_NV)
            parts[f"{self.divergence.name}_{name}"] = value_N
            total_N = total_N + weight * value_N
        assert isinstance(total_N, Tensor)
        return total_N, parts


def _weighted(
    corners: Mapping[str, ShiftedTarget], weights: Mapping[str, float]
) -> dict[str, tuple[float, ShiftedTarget]]:
    problems = [
        f"loss.weights has {name!r}, which is not a corner; corners are {', '.join(corners)}"
        for name in weights
        if name not in corners
    ]
    problems += [
        f"loss.weights.{name} is {weight}; it must be a finite number from 0"
        for name, weight in weights.items()
        if not 0 <= weight < math.inf
    ]
    total = sum(weights.values())
    if not problems and total <= 0:
        problems.append(f"loss.weights is {dict(weights)}: they add up to {total}; at least one must be above 0")
    if problems:
        raise ValueError("; ".join(problems))
    return {name: (weight / total, corners[name]) for name, weight in weights.items() if weight > 0}


@final
class SignedParallelogram(LabelMixture):
    """λ · CE + (1 − λ) · (KL(teacher ‖ π) + α [KL(raw student ‖ π) − KL(raw teacher ‖ π)]), π the student.

    Up to a constant this is the cross-entropy to the signed measure m = P_t + α (P_s0 − P_t0): on tokens with m < 0 the
    loss falls without bound as π goes to 0. Therefore negative mass is set to 0, m is normalised again, and the loss is
    KL(m ‖ π), unless ``unsafe`` asks for the unmodified formula.

    Args:
        delta_weight: α.
        unsafe: use the unmodified formula, which is unbounded below.
        temperature: τ.
        ce_weight: λ.
        temperature_squared: multiply the distillation term by τ².
    """

    def __init__(
        self,
        delta_weight: ScheduleSetting = 1.0,
        unsafe: bool = False,
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, ce_weight, temperature_squared)
        self._delta_weight = make_schedule(delta_weight, "delta_weight")
        self.unsafe = unsafe

    @property
    def term_requires(self) -> frozenset[str]:
        """The teacher; the raw models unless α is always 0."""
        return frozenset({TEACHER} if is_zero(self._delta_weight) else {TEACHER, STUDENT_RAW, TEACHER_RAW})

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """α, if it changes."""
        return moving(delta_weight=self._delta_weight)

    def term(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[N] nats, as ``signed_kl``."""
        log_q_NV = tempered_student(log_student_NV, self.temperature)
        weight = self._delta_weight.value
        factors = {TEACHER: 1.0} | ({STUDENT_RAW: weight, TEACHER_RAW: -weight} if weight else {})
        log_p = {role: tempered(ShiftedTarget(role)(logits), self.temperature) for role in factors}
        if self.unsafe:
            value_N = torch.stack([factor * kl(log_p[role], log_q_NV) for role, factor in factors.items()]).sum(0)
        else:
            value_N = kl(_positive_part(factors, log_p), log_q_NV)
        return value_N, {"signed_kl": value_N}


@torch.no_grad()
def _positive_part(factors: Mapping[str, float], log_p: Mapping[str, Tensor]) -> Tensor:
    """log of max(0, Σ factor · P), normalised over the vocabulary: [N, V]. Σ factor = 1, so the mass is at least 1."""
    if len(factors) == 1:
        (log_only_NV,) = log_p.values()
        return log_only_NV
    mass_NV = torch.zeros_like(log_p[TEACHER])
    for role, factor in factors.items():
        mass_NV.add_(log_p[role].exp(), alpha=factor)
    mass_NV.clamp_(min=0)
    return (mass_NV / mass_NV.sum(-1, keepdim=True)).log()
