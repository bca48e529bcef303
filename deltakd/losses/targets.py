"""Targets: the distribution that the student should match, as logits (DESIGN 3.2).

Every target is a base distribution plus weighted shifts, z = z_base + Σ weight · (z_to − z_from): one class, and one
function for each that has a name of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor

from deltakd.losses.schedules import AdaptiveInterpolation, Constant, is_zero, make_schedule, moving
from deltakd.losses.treatments import NO_TREATMENT, Treatment, difference, log_probs_of, ruled_out
from deltakd.types import (
    STUDENT,
    STUDENT_RAW,
    TEACHER,
    TEACHER_RAW,
    HeadLogits,
    Schedule,
    at_least_float32,
    teacher_pair,
)

#: A delta weight as the config gives it: a number, or {schedule, from, to, steps}.
Weight = float | Mapping[str, Any] | Schedule


class Target(Protocol):
    """Turns logits by role into target logits."""

    @property
    def requires(self) -> frozenset[str]:
        """The references whose logits it reads."""
        ...

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """What in it changes with training, by the name under which it is logged."""
        ...

    def __call__(self, logits: Mapping[str, Tensor]) -> Tensor:
        """[N, V] target logits at τ = 1, at least float32, detached."""
        ...


class Shift(NamedTuple):
    """weight · factor · (z_to − z_from).

    Args:
        weight: may change with training.
        to, origin: roles.
        factor: constant.
    """

    weight: Schedule
    to: str
    origin: str
    factor: float = 1.0

    @property
    def amount(self) -> float:
        """Weight times factor, now."""
        return self.weight.value * self.factor


@final
class ShiftedTarget:
    """z = z_base + Σ weight · T(log p_to − log p_from), T the treatment.

    A token that one of its models rules out (a logit of −inf) has no target mass. A shift whose weight is constantly 0
    is not there: its models are not read.

    Args:
        base: role; the student itself is read detached.
        shifts: the shifts.
        treatment: of each shift; where it masks, the shifts are 0 on implausible tokens.
        name: under which the weight is logged where it changes.
    """

    def __init__(
        self,
        base: str,
        shifts: Sequence[Shift] = (),
        treatment: Treatment = NO_TREATMENT,
        name: str = "delta_weight",
    ) -> None:
        self.base = base
        self.shifts = [shift for shift in shifts if shift.factor != 0.0 and not is_zero(shift.weight)]
        self.treatment = treatment
        self._name = name

    @property
    def requires(self) -> frozenset[str]:
        """The references among the base, the shifts and the treatment."""
        roles = {self.base, *(role for s in self.shifts for role in (s.to, s.origin))}
        if self.shifts:
            roles |= self.treatment.requires
        return frozenset(roles - {STUDENT})

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The weight, where it changes: all shifts with a changing weight share it."""
        return {k: v for s in self.shifts for k, v in moving(**{self._name: s.weight}).items()}

    @property
    def coefficients(self) -> dict[str, float] | None:
        """Role -> factor on its logits (those with 0 left out) now; None where a treatment makes it not linear."""
        if self.shifts and not self.treatment.is_off:
            return None
        total = {self.base: 1.0}
        for shift in self.shifts:
            total[shift.to] = total.get(shift.to, 0.0) + shift.amount
            total[shift.origin] = total.get(shift.origin, 0.0) - shift.amount
        return {role: factor for role, factor in total.items() if factor != 0.0}

    @torch.no_grad()
    def __call__(self, logits: Mapping[str, Tensor]) -> Tensor:
        """[N, V] target logits at τ = 1; untreated they are a linear sum of the roles' raw logits.

        A constant per row in any model's logits changes no distribution, so raw logits then stand for log-probs.

        Raises:
            ValueError: a role that it reads is missing.
        """
        missing = sorted(self.requires - set(logits))
        if missing:
            raise ValueError(
                f"the target reads {', '.join(missing)}, but logits were given for {', '.join(sorted(logits))} only"
            )
        coefficients = self.coefficients
        if coefficients is not None:
            return compose(coefficients, logits)
        roles = {self.base, *(role for s in self.shifts for role in (s.to, s.origin))}
        log_probs = log_probs_of(roles | self.treatment.requires, logits)
        shift_NV: Tensor | float = 0.0
        for shift in self.shifts:
            delta_NV = self.treatment(difference(log_probs[shift.to], log_probs[shift.origin]), log_probs)
            shift_NV = shift_NV + shift.amount * delta_NV
        implausible_NV = self.treatment.implausible(log_probs)
        assert isinstance(shift_NV, Tensor)
        if implausible_NV is not None:
            shift_NV = shift_NV.masked_fill(implausible_NV, 0.0)
        return (log_probs[self.base] + shift_NV).masked_fill(ruled_out(roles, logits), -math.inf)


@torch.no_grad()
def compose(coefficients: Mapping[str, float], logits: Mapping[str, Tensor]) -> Tensor:
    """Σ coefficient · logits over the roles, detached: [N, V] in at least float32, −inf where one of them is."""
    if isinstance(logits, HeadLogits):
        return logits.combined(coefficients)
    (first, factor), *others = coefficients.items()
    if not others and factor == 1.0:
        return at_least_float32(logits[first].detach())
    total_NV = factor * at_least_float32(logits[first].detach())
    for role, factor in others:
        total_NV = total_NV + factor * at_least_float32(logits[role].detach())
    return total_NV.masked_fill_(ruled_out(coefficients, logits), -math.inf)


def teacher_target() -> ShiftedTarget:
    """z_t: plain token-level distillation (Hinton et al., arXiv 1503.02531)."""
    return ShiftedTarget(TEACHER)


def delta_target(alpha: Weight = 1.0, treatment: Treatment = NO_TREATMENT) -> ShiftedTarget:
    """z_t + α (z_s0 − z_t0): the paper's target (arXiv 2509.14526; DESIGN 3.1).

    Args:
        alpha: α, the delta weight. 0 is the teacher itself, and then no raw model is read; 1 is the raw student plus
            the whole shift of the teacher's fine-tuning.
        treatment: of log p_s0 − log p_t0.
    """
    weight = make_schedule(alpha, "delta_weight")
    return ShiftedTarget(TEACHER, [Shift(weight, STUDENT_RAW, TEACHER_RAW)], treatment)


def shift_target(beta: Weight = 1.0, treatment: Treatment = NO_TREATMENT) -> ShiftedTarget:
    """z_s0 + β (z_t − z_t0): the teacher's shift on the raw student, as proxy-tuning decodes (arXiv 2401.08565).

    Args:
        beta: β, the delta weight.
        treatment: of log p_t − log p_t0.
    """
    return ShiftedTarget(STUDENT_RAW, [Shift(make_schedule(beta, "delta_weight"), TEACHER, TEACHER_RAW)], treatment)


def bilinear_target(u: Weight = 1.0, v: float = 1.0, treatment: Treatment = NO_TREATMENT) -> ShiftedTarget:
    """z_t0 + u (z_s0 − z_t0) + v (z_t − z_t0): the plane of the three models (DESIGN 3.2; our reconstruction).

    (u, v) = (α, 1) is ``delta``, (1, β) is ``shift``.

    Args:
        u: the delta weight.
        v: how much of the teacher's shift.
        treatment: of both shifts.

    Raises:
        ValueError: v is not finite.
    """
    shifts = [
        Shift(make_schedule(u, "delta_weight"), STUDENT_RAW, TEACHER_RAW),
        Shift(Constant(v, "loss.target.v"), TEACHER, TEACHER_RAW),
    ]
    return ShiftedTarget(TEACHER_RAW, shifts, treatment)


def multi_teacher_target(
    weights: Sequence[float] = (0.5, 0.5), delta_weight: Weight = 1.0, treatment: Treatment = NO_TREATMENT
) -> ShiftedTarget:
    """z_s0 + delta_weight · Σ_k β_k (z_tk − z_t0k): the shifts of several teachers on the raw student.

    Args:
        weights: β_k of the pairs (teacher, teacher_raw), (teacher_2, teacher_raw_2), ...
        delta_weight: a factor on all of them.
        treatment: of each shift.

    Raises:
        ValueError: no weights, or one that is not finite.
    """
    if not weights or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"loss.target.weights is {list(weights)}; give one finite number for each pair of teacher and raw teacher"
        )
    factor = make_schedule(delta_weight, "delta_weight")
    pairs = [(weight, *teacher_pair(number)) for number, weight in enumerate(weights, 1)]
    return ShiftedTarget(STUDENT_RAW, [Shift(factor, tuned, raw, weight) for weight, tuned, raw in pairs], treatment)


def taid_target(start: float = 0.4, end: float = 1.0, rate: float = 5e-4, momentum: float = 0.99) -> ShiftedTarget:
    """(1 − u) · sg[z_student] + u · z_t, u moving from ``start`` to ``end`` (TAID, arXiv 2501.16937).

    Args:
        start, end, rate, momentum: as for ``AdaptiveInterpolation``.
    """
    u = AdaptiveInterpolation(start, end, rate, momentum)
    return ShiftedTarget(STUDENT, [Shift(u, TEACHER, STUDENT)], name="taid_weight")
