"""Delta matching: losses that compare the student's own shift with the teacher's (docs/design.md#parallel).

The paper (arXiv 2509.14526) names parallel variants, but we could not obtain their formulas: these are our
reconstructions. They have no kernel; autograd differentiates them chunk by chunk.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor

from deltakd.losses.distillation import divergence_to
from deltakd.losses.divergences import Divergence, kl
from deltakd.losses.mixing import LabelMixture, tempered
from deltakd.losses.schedules import ScheduleSetting, at_least, is_zero, make_schedule, moving
from deltakd.losses.targets import teacher_target
from deltakd.losses.treatments import Treatment, difference, log_probs_of, ruled_out
from deltakd.types import STUDENT, STUDENT_RAW, TEACHER, TEACHER_RAW, Schedule, require_kind

#: Without a mask, nearly all mass of a normalised ratio is on tokens that no model would generate.
PLAUSIBLE = Treatment(mask=0.1)


class Matching(ABC):
    """Measures how far the student's shift is from the teacher's.

    To write your own, subclass it: ``name``, ``requires`` and ``__call__``.
    """

    #: The name under which its values are logged.
    name: str

    @property
    @abstractmethod
    def requires(self) -> frozenset[str]:
        """The references that it reads."""

    @abstractmethod
    def __call__(self, logits: Mapping[str, Tensor], log_student_NV: Tensor, temperature: float) -> Tensor:
        """[N] from role -> [N, V] logits and the student's log-probs at τ = 1."""

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The numbers that change with training, by name."""
        return {}

    def whole_vocabulary_reasons(self, temperature: float) -> tuple[str, ...]:
        """As for ``Loss``, at the temperature of the loss."""
        return ()


def _left_out(
    roles: Iterable[str],
    logits: Mapping[str, Tensor],
    log_student_NV: Tensor,
    treatment: Treatment,
    log_probs: Mapping[str, Tensor],
) -> Tensor:
    """[N, V] bool, True for tokens outside the support: ruled out by any model, or implausible under the mask."""
    left_out_NV = ruled_out(roles, logits) | torch.isneginf(log_student_NV)
    implausible_NV = treatment.implausible(log_probs)
    return left_out_NV if implausible_NV is None else left_out_NV | implausible_NV


@final
class RatioMatching(Matching):
    """KL( N[p_to / p_from] ‖ N[π_θ / p_over] ), both sides normalised over the same tokens (docs/design.md#parallel).

    These are the plausible tokens that none of the four models rules out.

    ``parallel_ratio`` compares teacher / teacher_raw with student / student_raw, ``parallel_cross`` compares
    student_raw / teacher_raw with student / teacher. τ divides both log-ratios.

    Args:
        to: the numerator of the target's ratio.
        origin: its denominator.
        over: the denominator of the student's ratio.
        treatment: of the target's shift. Its mask restricts the support of both sides; without a mask about 99.8 % of
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
        require_kind(treatment, Treatment, "loss.matching.treatment")
        self.treatment = treatment

    @property
    def requires(self) -> frozenset[str]:
        """The three roles, and those of the treatment."""
        return frozenset({self.to, self.origin, self.over}) | self.treatment.requires

    def whole_vocabulary_reasons(self, temperature: float) -> tuple[str, ...]:
        """A ratio weighs every plausible token, likely or not."""
        return ("a ratio of two models is compared on plausible tokens one by one",)

    def __call__(self, logits: Mapping[str, Tensor], log_student_NV: Tensor, temperature: float) -> Tensor:
        log_probs = log_probs_of(self.requires, logits)
        with torch.no_grad():
            roles = (self.to, self.origin, self.over)
            left_out_NV = _left_out(roles, logits, log_student_NV, self.treatment, log_probs)
            shift_NV = self.treatment(difference(log_probs[self.to], log_probs[self.origin]), log_probs)
            # If no token is left there is nothing to match: two uniform distributions, and no gradient.
            nothing_N1 = left_out_NV.all(-1, keepdim=True)
            shift_NV = shift_NV.masked_fill(left_out_NV, -math.inf).masked_fill(nothing_N1, 0.0)
            target_NV = tempered(shift_NV, temperature)
            over_NV = log_probs[self.over].masked_fill(left_out_NV, 0.0)
        student_NV = (log_student_NV - over_NV).masked_fill(left_out_NV, -math.inf).masked_fill(nothing_N1, 0.0)
        return kl(target_NV, tempered(student_NV, temperature))


@final
class LogitMatching(Matching):
    """Var_w(d / τ), d = (log π_θ − log π_s0) − β (log π_t − log π_t0), over the vocabulary (docs/design.md#parallel).

    It is at least 0, and 0 if the student's shift is β times the teacher's up to a constant. Tokens that any of the
    four models rules out have no weight.

    Args:
        weighting: source of the probabilities w (at τ = 1, detached): ``teacher``, ``student``, ``student_raw``, or
            ``uniform``.
        beta: β. It is the delta weight in ``parallel_logit``, and a separate number in ``kd_plus_delta``.
        beta_name: the config key of β, and the name under which it is logged if it changes.
        treatment: of the teacher's shift; its mask leaves implausible tokens out of the variance.

    Raises:
        ValueError: the weighting is unknown, or β is not finite.
    """

    name = "logit_variance"
    WEIGHTINGS = (TEACHER, "uniform", STUDENT, STUDENT_RAW)

    def __init__(
        self,
        weighting: str = TEACHER,
        beta: ScheduleSetting = 1.0,
        beta_name: str = "loss.matching.beta",
        treatment: Treatment | None = None,
    ) -> None:
        if weighting not in self.WEIGHTINGS:
            raise ValueError(f"loss.matching.weighting is {weighting!r}; allowed: {', '.join(self.WEIGHTINGS)}")
        self.weighting = weighting
        self.treatment = Treatment() if treatment is None else treatment
        require_kind(self.treatment, Treatment, "loss.matching.treatment")
        self._beta = make_schedule(beta, beta_name)
        self._beta_name = beta_name

    @property
    def requires(self) -> frozenset[str]:
        """Teacher, raw teacher, raw student, and the roles of the treatment."""
        return frozenset({TEACHER, TEACHER_RAW, STUDENT_RAW}) | self.treatment.requires

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """β, if it changes."""
        return moving(**{self._beta_name: self._beta})

    def whole_vocabulary_reasons(self, temperature: float) -> tuple[str, ...]:
        """A uniform weighting and a treatment need every token; the formula's log-probs are at τ = 1."""
        uniform = "a logit matching with weighting=uniform weighs all tokens of the vocabulary alike"
        tempered_probs = f"a logit matching needs log-probs at temperature 1, and loss.temperature is {temperature:g}"
        return (
            *([uniform] if self.weighting == "uniform" else []),
            *([tempered_probs] if temperature != 1.0 else []),
            *self.treatment.whole_vocabulary_reasons,
        )

    def __call__(self, logits: Mapping[str, Tensor], log_student_NV: Tensor, temperature: float) -> Tensor:
        """[N] squared nats."""
        log_probs = log_probs_of(self.requires, logits)
        with torch.no_grad():
            shift_NV = self.treatment(difference(log_probs[TEACHER], log_probs[TEACHER_RAW]), log_probs)
            left_out_NV = _left_out(self.requires, logits, log_student_NV, self.treatment, log_probs)
            weight_NV = self._weights(log_probs, log_student_NV).masked_fill(left_out_NV, -math.inf)
            # If no token is left, every difference below is 0 whatever the weights.
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
    """λ · CE(labels) + (1 − λ) · matching, per token (docs/design.md#parallel; our reconstructions).

    Args:
        matching: how the student's shift is compared.
        temperature: τ.
        ce_weight: λ.
        temperature_squared: multiply the distillation term by τ².

    Raises:
        ValueError: ``matching`` is no Matching, or a number is out of range.
    """

    def __init__(
        self,
        matching: Matching,
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, ce_weight, temperature_squared)
        require_kind(matching, Matching, "loss.matching")
        self.matching = matching

    @property
    def term_requires(self) -> frozenset[str]:
        return self.matching.requires

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        return self.matching.schedules

    @property
    def term_whole_vocabulary_reasons(self) -> tuple[str, ...]:
        return self.matching.whole_vocabulary_reasons(self.temperature)

    def term(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The matching: [N], under its name."""
        value_N = self.matching(logits, log_student_NV, self.temperature)
        return value_N, {self.matching.name: value_N}


@final
class DistillationPlusMatching(LabelMixture):
    """λ · CE + (1 − λ) · [D(teacher, student) + γ · matching]: ``kd_plus_delta``.

    Our reconstruction (docs/design.md#parallel).

    Args:
        divergence: D.
        matching: the term added to D.
        delta_weight: γ ≥ 0.
        temperature: τ.
        ce_weight: λ.
        temperature_squared: multiply the distillation term by τ².

    Raises:
        ValueError: γ is not finite or becomes negative, or a part is not of its base class.
    """

    def __init__(
        self,
        divergence: Divergence,
        matching: Matching,
        delta_weight: ScheduleSetting = 1.0,
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, ce_weight, temperature_squared)
        require_kind(divergence, Divergence, "loss.divergence")
        require_kind(matching, Matching, "loss.matching")
        self._delta_weight = at_least(0.0, make_schedule(delta_weight, "delta_weight"), "delta_weight")
        self.divergence = divergence
        self.matching = matching

    @property
    def term_requires(self) -> frozenset[str]:
        """The teacher; those of the matching unless γ is always 0."""
        return frozenset({TEACHER}) | (frozenset() if is_zero(self._delta_weight) else self.matching.requires)

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """γ, if it changes, and those of the matching."""
        return {**self.matching.schedules, **moving(delta_weight=self._delta_weight)}

    @property
    def term_whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """Reasons of the divergence; reasons of the matching unless γ is always 0."""
        matching = () if is_zero(self._delta_weight) else self.matching.whole_vocabulary_reasons(self.temperature)
        return self.divergence.whole_vocabulary_reasons + matching

    def term(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """D + γ · matching: [N]; both by name."""
        divergence_N = divergence_to(teacher_target(), self.divergence, self.temperature, logits, log_student_NV)
        parts = {self.divergence.name: divergence_N}
        if is_zero(self._delta_weight):
            return divergence_N, parts
        matching_N = self.matching(logits, log_student_NV, self.temperature)
        return divergence_N + self._delta_weight.value * matching_N, parts | {self.matching.name: matching_N}
