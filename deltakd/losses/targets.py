"""Targets: the distribution that the student should match, as logits (docs/design.md#targets).

Every target here is a base distribution plus weighted shifts, z = z_base + Σ weight · (z_to − z_from): one class, and
one function per named target.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from deltakd.losses.schedules import (
    AdaptiveInterpolation,
    Constant,
    ScheduleSetting,
    ends_of,
    is_zero,
    make_schedule,
    moving,
)
from deltakd.losses.treatments import NO_TREATMENT, Treatment, difference, log_probs_of, ruled_out
from deltakd.types import (
    STUDENT,
    STUDENT_RAW,
    TEACHER,
    TEACHER_RAW,
    Gate,
    HeadLogits,
    Schedule,
    at_least_float32,
    is_teacher,
    require_kind,
    teacher_pair,
)


class ReadsTarget:
    """What losses and scores with a target take over from it."""

    target: Target

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """Schedules of the target."""
        return self.target.schedules

    @property
    def teacher_factor(self) -> float:
        """That of the target."""
        return self.target.teacher_factor


class Target(ABC):
    """Turns logits by role into target logits. To write your own, subclass it: ``requires`` and ``__call__``."""

    #: As for ``Loss``.
    needs_alignment: bool = False

    @property
    @abstractmethod
    def requires(self) -> frozenset[str]:
        """The references whose logits it reads."""

    @abstractmethod
    def __call__(self, logits: Mapping[str, Tensor]) -> Tensor:
        """[N, V] target logits at τ = 1, at least float32, detached."""

    def with_parts(self, logits: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the target, and its values to log: name -> [N]."""
        return self(logits), {}

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The numbers that change with training, by the name under which they are logged."""
        return {}

    @property
    def coefficients(self) -> Mapping[str, float] | None:
        """Role -> factor on its logits, for the coming step; None if the target is not linear in the logits."""
        return None

    @property
    def gate(self) -> Gate | None:
        """The term added to the ``coefficients`` with a weight per token, for the coming step; None: nothing."""
        return None

    @property
    def teacher_factor(self) -> float:
        """The largest factor that the teachers' logits get during the run, v of docs/design.md#plane."""
        return 1.0

    @property
    def whole_vocabulary_reasons(self) -> tuple[str, ...]:
        return ()


class Shift(NamedTuple):
    """weight · factor · (z_to − z_from).

    Args:
        weight: a number that may change with training: the delta weight, or TAID's u.
        to, origin: roles.
        factor: a constant.
    """

    weight: Schedule
    to: str
    origin: str
    factor: float = 1.0

    @property
    def coefficient(self) -> float:
        """The current weight times factor."""
        return self.weight.value * self.factor


@final
class ShiftedTarget(Target):
    """z = z_base + Σ weight · T(log p_to − log p_from), T the treatment.

    A token that any of its models rules out (a logit of −inf) gets no target mass. A shift whose weight is always 0 is
    dropped, and its models are not read.

    This is the definition. Without a treatment the target is linear in the logits, and in training it is composed
    inside the matrix products of the heads: by ``deltakd.kernels.fused.fused_chunk`` under forward KL, by
    ``deltakd.types.HeadLogits.combined`` otherwise. ``tests/kernels/test_chunked.py`` shows that both agree with it
    (``test_every_loss_by_name``, values and gradients; ``test_sums_of_heads``).

    Args:
        base: role; the student itself is read detached.
        shifts: the shifts.
        treatment: of each shift; its mask sets the shifts to 0 on implausible tokens.
        name: the name under which the weight is logged if it changes.
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
        require_kind(treatment, Treatment, "loss.target.treatment")
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
        """The weight, if it changes; all shifts with a changing weight share it."""
        return {k: v for s in self.shifts for k, v in moving(**{self._name: s.weight}).items()}

    @property
    def coefficients(self) -> dict[str, float] | None:
        """Role -> factor on its logits, zeros left out, for the coming step; None if a shift is treated."""
        if self.shifts and not self.treatment.is_off:
            return None
        total = {self.base: 1.0}
        for shift in self.shifts:
            total[shift.to] = total.get(shift.to, 0.0) + shift.coefficient
            total[shift.origin] = total.get(shift.origin, 0.0) - shift.coefficient
        return {role: factor for role, factor in total.items() if factor != 0.0}

    @property
    def teacher_factor(self) -> float:
        """The largest sum of the teachers' coefficients; shifts that share a schedule reach its ends together."""
        slopes: dict[int, tuple[Schedule, float]] = {}
        for shift in self.shifts:
            slope = shift.factor * (is_teacher(shift.to) - is_teacher(shift.origin))
            _, before = slopes.get(id(shift.weight), (shift.weight, 0.0))
            slopes[id(shift.weight)] = (shift.weight, before + slope)
        largest = (max(slope * end for end in ends_of(weight)) for weight, slope in slopes.values())
        return float(is_teacher(self.base)) + sum(largest)

    @property
    def whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """Reasons of the treatment, if there is a shift to treat."""
        return self.treatment.whole_vocabulary_reasons if self.shifts else ()

    @torch.no_grad()
    def __call__(self, logits: Mapping[str, Tensor]) -> Tensor:
        """[N, V] target logits at τ = 1; without a treatment a linear sum of the roles' raw logits.

        A constant per row in a model's logits changes no distribution, so raw logits can then stand for log-probs.

        Raises:
            ValueError: the logits of a role that it reads are missing.
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
            shift_NV = shift_NV + shift.coefficient * delta_NV
        implausible_NV = self.treatment.implausible(log_probs)
        assert isinstance(shift_NV, Tensor)
        if implausible_NV is not None:
            shift_NV = shift_NV.masked_fill(implausible_NV, 0.0)
        return (log_probs[self.base] + shift_NV).masked_fill(ruled_out(roles, logits), -math.inf)


@torch.no_grad()
def compose(coefficients: Mapping[str, float], logits: Mapping[str, Tensor]) -> Tensor:
    """Σ coefficient · logits over the roles, detached: [N, V], at least float32, −inf if any of them is."""
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


def delta_target(delta_weight: ScheduleSetting = 1.0, treatment: Treatment = NO_TREATMENT) -> ShiftedTarget:
    """z_t + α (z_s0 − z_t0): the paper's target (arXiv 2509.14526; docs/design.md#delta-kd).

    Args:
        delta_weight: α. 0 is the teacher itself, and no raw model is read; 1 is the raw student plus the whole shift
            of the teacher's fine-tuning.
        treatment: of log p_s0 − log p_t0.
    """
    weight = make_schedule(delta_weight, "delta_weight")
    return ShiftedTarget(TEACHER, [Shift(weight, STUDENT_RAW, TEACHER_RAW)], treatment)


def shift_target(delta_weight: ScheduleSetting = 1.0, treatment: Treatment = NO_TREATMENT) -> ShiftedTarget:
    """z_s0 + β (z_t − z_t0): the teacher's shift on the raw student, as proxy-tuning decodes (arXiv 2401.08565).

    Args:
        delta_weight: β.
        treatment: of log p_t − log p_t0.
    """
    weight = make_schedule(delta_weight, "delta_weight")
    return ShiftedTarget(STUDENT_RAW, [Shift(weight, TEACHER, TEACHER_RAW)], treatment)


def bilinear_target(
    delta_weight: ScheduleSetting = 1.0, v: float = 1.0, treatment: Treatment = NO_TREATMENT
) -> ShiftedTarget:
    """z_t0 + w (z_s0 − z_t0) + v (z_t − z_t0): the plane of the three models (docs/design.md#plane).

    (w, v) = (α, 1) is ``delta``, (1, β) is ``shift``.

    Args:
        delta_weight: w.
        v: the factor on the teacher's shift.
        treatment: of both shifts.

    Raises:
        ValueError: v is not finite.
    """
    shifts = [
        Shift(make_schedule(delta_weight, "delta_weight"), STUDENT_RAW, TEACHER_RAW),
        Shift(Constant(v, "loss.target.v"), TEACHER, TEACHER_RAW),
    ]
    return ShiftedTarget(TEACHER_RAW, shifts, treatment)


def multi_teacher_target(
    weights: Sequence[float] = (0.5, 0.5), delta_weight: ScheduleSetting = 1.0, treatment: Treatment = NO_TREATMENT
) -> ShiftedTarget:
    """z_s0 + delta_weight · Σ_k β_k (z_tk − z_t0k): the shifts of several teachers on the raw student.

    Our reconstruction: the paper (arXiv 2509.14526) mentions several teachers (docs/design.md#targets).

    Args:
        weights: β_k, one per pair (teacher, teacher_raw), (teacher_2, teacher_raw_2), ...
        delta_weight: a factor on all β_k.
        treatment: of each shift.

    Raises:
        ValueError: no weights, or one that is not finite.
    """
    if not weights or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"loss.target.weights is {list(weights)}; give one finite number for each pair of teacher and raw teacher"
        )
    weight = make_schedule(delta_weight, "delta_weight")
    pairs = [(factor, *teacher_pair(number)) for number, factor in enumerate(weights, 1)]
    return ShiftedTarget(STUDENT_RAW, [Shift(weight, tuned, raw, factor) for factor, tuned, raw in pairs], treatment)


def taid_target(start: float = 0.4, end: float = 1.0, rate: float = 5e-4, momentum: float = 0.99) -> ShiftedTarget:
    """(1 − u) · sg[z_student] + u · z_t, u moving from ``start`` to ``end`` (TAID, arXiv 2501.16937).

    Args:
        start: the first u.
        end: the last u.
        rate: how strongly a falling loss moves u; see ``AdaptiveInterpolation``.
        momentum: of the smoothed fall of the loss.
    """
    u = AdaptiveInterpolation(start, end, rate, momentum)
    return ShiftedTarget(STUDENT, [Shift(u, TEACHER, STUDENT)], name="taid_weight")
