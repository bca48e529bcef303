"""Delta matching: losses that compare the student's own shift with the teacher's (DESIGN 3.4).

The paper (arXiv 2509.14526) speaks of parallel variants and prints no formula that we could obtain: these are our
reconstructions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol, final

import torch
from torch import Tensor

from deltakd.losses.distillation import divergence_to
from deltakd.losses.divergences import Divergence, kl
from deltakd.losses.mixing import LabelMixture, tempered
from deltakd.losses.schedules import at_least, is_zero, make_schedule, moving
from deltakd.losses.targets import Weight, teacher_target
from deltakd.losses.treatments import Treatment, difference, log_probs_of, ruled_out
from deltakd.types import STUDENT, STUDENT_RAW, TEACHER, TEACHER_RAW, Schedule

#: Without a mask nearly all of the mass of a normalised ratio sits on tokens that no model would say.
PLAUSIBLE = Treatment(mask=0.1)


class Matching(Protocol):
    """How far the student's shift is from the teacher's."""

    name: str

    @property
    def requires(self) -> frozenset[str]:
        """The references that it reads."""
        ...

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """What in it changes with training."""
        ...

    def __call__(self, logits: Mapping[str, Tensor], log_student_NV: Tensor, temperature: float) -> Tensor:
        """[N] from role -> [N, V] logits and the student's log-probs at τ = 1."""
        ...


def _left_out(
    roles: Iterable[str], logits: Mapping[str, Tensor], treatment: Treatment, log_probs: Mapping[str, Tensor]
) -> Tensor:
    """[N, V] bool: the tokens outside the support, ruled out by a role or implausible under the mask."""
    left_out_NV = ruled_out(roles, logits)
    implausible_NV = treatment.implausible(log_probs)
    return left_out_NV if implausible_NV is None else left_out_NV | implausible_NV


@final
class RatioMatching:
    """KL( N[p_to / p_from] ‖ N[π_θ / p_over] ), both sides normalised over the same plausible tokens.

    ``parallel_ratio`` is teacher / teacher_raw against student / student_raw, ``parallel_cross`` is student_raw /
    teacher_raw against student / teacher. τ divides both log-ratios.

    Args:
        to, origin: the roles of the target's ratio.
        over: the role that the student is divided by.
        treatment: of the target's shift. Its mask restricts the support of both sides; without a mask some 99.8 % of
            the target's mass is on the tail of a real vocabulary.
    """

    name = "ratio_kl"

    def __init__(
        self,
        to: str = TEACHER,
        origin: str = TEACHER_RAW,
        over: str = STUDENT_RAW,
        treatment: Treatment = PLAUSIBLE,
    ) -> None:
        self.to, self.origin, self.over = to, origin, over
        self.treatment = treatment

    @property
    def requires(self) -> frozenset[str]:
        """The three roles, and those of the treatment."""
        return frozenset({self.to, self.origin, self.over}) | self.treatment.requires

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """Nothing changes."""
        return {}

    def __call__(self, logits: Mapping[str, Tensor], log_student_NV: Tensor, temperature: float) -> Tensor:
        """[N] nats."""
        log_probs = log_probs_of(self.requires, logits)
        with torch.no_grad():
            left_out_NV = _left_out((self.to, self.origin, self.over), logits, self.treatment, log_probs)
            shift_NV = self.treatment(difference(log_probs[self.to], log_probs[self.origin]), log_probs)
            # Where no token is left there is nothing to match: two uniform distributions, and no gradient.
            nothing_N1 = left_out_NV.all(-1, keepdim=True)
            shift_NV = shift_NV.masked_fill(left_out_NV, -math.inf).masked_fill(nothing_N1, 0.0)
            target_NV = tempered(shift_NV, temperature)
            over_NV = log_probs[self.over].masked_fill(left_out_NV, 0.0)
        student_NV = (log_student_NV - over_NV).masked_fill(left_out_NV, -math.inf).masked_fill(nothing_N1, 0.0)
        return kl(target_NV, tempered(student_NV, temperature))


@final
class LogitMatching:
    """Var_w(d / τ), d = (log π_θ − log π_s0) − β (log π_t − log π_t0), the variance over the vocabulary (DESIGN 3.4).

    It is bounded below by 0, where the student's shift is β times the teacher's up to a constant.

    Args:
        weighting: under whose probabilities (τ = 1, detached): ``teacher``, ``student``, ``student_raw`` or
            ``uniform``.
        beta: β.
        beta_name: config key of β, and the name under which it is logged where it changes.
        treatment: of the teacher's shift; its mask leaves implausible tokens out of the variance.

    Raises:
        ValueError: unknown weighting, or β is not finite.
    """

    name = "logit_variance"
    WEIGHTINGS = (TEACHER, "uniform", STUDENT, STUDENT_RAW)

    def __init__(
        self,
        weighting: str = TEACHER,
        beta: Weight = 1.0,
        beta_name: str = "loss.matching.beta",
        treatment: Treatment | None = None,
    ) -> None:
        if weighting not in self.WEIGHTINGS:
            raise ValueError(f"loss.matching.weighting is {weighting!r}; allowed: {', '.join(self.WEIGHTINGS)}")
        self.weighting = weighting
        self.treatment = treatment or Treatment()
        self._beta = make_schedule(beta, beta_name)
        self._beta_name = beta_name

    @property
    def requires(self) -> frozenset[str]:
        """Teacher, raw teacher, raw student, and the roles of the treatment."""
        return frozenset({TEACHER, TEACHER_RAW, STUDENT_RAW}) | self.treatment.requires

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """β, where it changes."""
        return moving(**{self._beta_name: self._beta})

    def __call__(self, logits: Mapping[str, Tensor], log_student_NV: Tensor, temperature: float) -> Tensor:
        """[N] squared nats."""
        log_probs = log_probs_of(self.requires, logits)
        with torch.no_grad():
            shift_NV = self.treatment(difference(log_probs[TEACHER], log_probs[TEACHER_RAW]), log_probs)
            left_out_NV = _left_out(self.requires, logits, self.treatment, log_probs)
            weight_NV = self._weights(log_probs, log_student_NV).masked_fill(left_out_NV, -math.inf)
            # Where no token is left, every difference below is 0 under any weights.
            weight_NV = weight_NV.masked_fill(left_out_NV.all(-1, keepdim=True), 0.0).softmax(-1)
            wanted_NV = log_probs[STUDENT_RAW] + self._beta.value * shift_NV
        d_NV = ((log_student_NV - wanted_NV) / temperature).masked_fill(left_out_NV, 0.0)
        mean_N1 = (weight_NV * d_NV).sum(-1, keepdim=True)
        return (weight_NV * (d_NV - mean_N1).square()).sum(-1)

    def _weights(self, log_probs: Mapping[str, Tensor], log_student_NV: Tensor) -> Tensor:
        if self.weighting == "uniform":
            return torch.zeros_like(log_student_NV)
        return log_student_NV.detach() if self.weighting == STUDENT else log_probs[self.weighting]


@final
class DeltaMatching(LabelMixture):
    """λ · CE(labels) + (1 − λ) · matching, per token.

    Args:
        matching: what the student's shift is held against.
        temperature, ce_weight, temperature_squared: as for ``LabelMixture``.
    """

    def __init__(
        self,
        matching: Matching,
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, ce_weight, temperature_squared)
        self.matching = matching

    @property
    def term_requires(self) -> frozenset[str]:
        """The references of the matching."""
        return self.matching.requires

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """Those of the matching."""
        return self.matching.schedules

    def term(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The matching: [N], under its name."""
        value_N = self.matching(logits, log_student_NV, self.temperature)
        return value_N, {self.matching.name: value_N}


@final
class DistillationPlusMatching(LabelMixture):
    """λ · CE + (1 − λ) · [D(teacher, student) + γ · matching]: ``kd_plus_delta`` (DESIGN 3.4; our reconstruction).

    Args:
        divergence: D.
        matching: what is added to it.
        gamma: γ ≥ 0, the delta weight.
        temperature, ce_weight, temperature_squared: as for ``LabelMixture``.

    Raises:
        ValueError: γ is negative at some time, or not finite.
    """

    def __init__(
        self,
        divergence: Divergence,
        matching: Matching,
        gamma: Weight = 1.0,
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, ce_weight, temperature_squared)
        self._gamma = at_least(0.0, make_schedule(gamma, "delta_weight"), "delta_weight")
        self.divergence = divergence
        self.matching = matching

    @property
    def term_requires(self) -> frozenset[str]:
        """The teacher; the others only where γ is not constantly 0."""
        return frozenset({TEACHER}) | (frozenset() if is_zero(self._gamma) else self.matching.requires)

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """γ, where it changes, and those of the matching."""
        return {**self.matching.schedules, **moving(delta_weight=self._gamma)}

    def term(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """D + γ · matching: [N]; both by name."""
        divergence_N = divergence_to(teacher_target(), self.divergence, self.temperature, logits, log_student_NV)
        parts = {self.divergence.name: divergence_N}
        if is_zero(self._gamma):
            return divergence_N, parts
        matching_N = self.matching(logits, log_student_NV, self.temperature)
        return divergence_N + self._gamma.value * matching_N, parts | {self.matching.name: matching_N}
