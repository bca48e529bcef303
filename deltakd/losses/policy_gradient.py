"""Losses of sampled tokens: a policy gradient, its advantage exact over the vocabulary (docs/design.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor

from deltakd.losses.sampled import (
    check_numbers,
    mean_under,
    of_labels,
    policy_gain,
    sampled_log_probs,
    watched,
    with_gain,
    with_labels,
)
from deltakd.losses.schedules import Constant
from deltakd.losses.scores import Score, TeacherShift, TowardsTarget
from deltakd.losses.targets import Shift, ShiftedTarget, Target, teacher_target
from deltakd.types import (
    STUDENT,
    STUDENT_RAW,
    TEACHER,
    TEACHER_RAW,
    Loss,
    LossOutput,
    Schedule,
    at_least_float32,
    require_kind,
)


@final
class PolicyGradient(Loss):
    """λ · CE + (1 − λ) · PG per token, where the gradient of PG is −A ∇log π_θ(label), A detached.

    The labels are tokens that the student sampled. A is the score of the label minus the score's exact mean under the
    student, which changes no expected gradient and lowers its variance. The *value* of PG is what the gradient
    estimates (``Score.estimate``), not the surrogate, whose value is meaningless.

    Where one round of responses serves several optimiser steps, logits carry the log-probs with which the labels were
    sampled, and the ratio π_θ / π_sampled replaces ∇log, clipped as in PPO (arXiv 1707.06347).

    Args:
        score: the worth of a token.
        agrees_with: a second score; tokens whose two advantages differ in sign, or where one is 0, get A = 0.
        ce_weight: λ in [0, 1].
        advantage_clip: bound on |A| in nats, or None.
        ratio_clip: ε: the gain from ratios outside [1 − ε, 1 + ε] is cut off; None: never.

    Raises:
        ValueError: a score is not one, or a number is out of range.
    """

    needs_sampled_tokens = True

    def __init__(
        self,
        score: Score,
        agrees_with: Score | None = None,
        ce_weight: float = 0.0,
        advantage_clip: float | None = None,
        ratio_clip: float | None = 0.2,
    ) -> None:
        require_kind(score, Score, "loss.score")
        if agrees_with is not None:
            require_kind(agrees_with, Score, "loss.agrees_with")
        check_numbers(ce_weight, ratio_clip, advantage_clip=advantage_clip)
        self.score = score
        self.agrees_with = agrees_with
        self.ce_weight = float(ce_weight)
        self.advantage_clip = advantage_clip
        self.ratio_clip = ratio_clip
        self.has_unbounded_ratios = ratio_clip is None

    @property
    def requires(self) -> frozenset[str]:
        """The references that the scores read; none if λ = 1."""
        if self.ce_weight == 1.0:
            return frozenset()
        return self.score.requires | (frozenset() if self.agrees_with is None else self.agrees_with.requires)

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        return {**self.score.schedules, **({} if self.agrees_with is None else self.agrees_with.schedules)}

    @property
    def teacher_factor(self) -> float:
        """That of the score."""
        return self.score.teacher_factor

    @property
    def whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """A sampled token may be outside the K."""
        return () if self.ce_weight == 1.0 else ("a policy gradient scores the sampled token by itself",)

    def __call__(self, logits: Mapping[str, Tensor], labels: Tensor) -> LossOutput:
        """Score N sampled tokens.

        Args:
            logits: role -> [N, V] float, for ``student`` and every role in ``requires``. ``HeadLogits`` may
                know how likely the labels were when an earlier student sampled them.
            labels: [N] int64, the sampled tokens.

        Returns:
            per_token [N] nats; parts: ``ce``, the estimate under the score's name, ``advantage`` and
            ``advantage_square`` of the labels, ``agreeing`` (1 or 0) if there is a second score, and those of
            ``watched``.
        """
        log_student_NV = at_least_float32(logits[STUDENT]).log_softmax(-1)
        log_pi_N = of_labels(log_student_NV, labels)
        if self.ce_weight == 1.0:
            return LossOutput(-log_pi_N, {"ce": -log_pi_N})
        advantage_N, estimate_N, parts = self._advantage(logits, log_student_NV.detach(), labels)
        gain_N = policy_gain(advantage_N, log_pi_N, sampled_log_probs(logits), self.ratio_clip)
        per_token_N = with_labels(with_gain(estimate_N, gain_N), log_pi_N, self.ce_weight)
        return LossOutput(per_token_N, {"ce": -log_pi_N, self.score.name: estimate_N, **parts})

    @torch.no_grad()
    def _advantage(
        self, logits: Mapping[str, Tensor], log_student_NV: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the advantages of the labels [N], the estimate [N], and the parts to log."""
        # First: it keeps the teacher's logits, and the scores then take these instead of multiplying its head again.
        seen = watched(logits, log_student_NV, self.requires)
        score_NV = self.score(logits, log_student_NV)
        advantage_N = centred(score_NV, log_student_NV, labels)
        estimate_N = self.score.estimate(score_NV, log_student_NV)
        agreeing: dict[str, Tensor] = {}
        if self.agrees_with is not None:
            other_N = centred(self.agrees_with(logits, log_student_NV), log_student_NV, labels)
            kept_N = advantage_N * other_N > 0
            advantage_N = advantage_N.where(kept_N, 0.0)
            agreeing = {"agreeing": kept_N.to(advantage_N.dtype)}
        if self.advantage_clip is not None:
            advantage_N = advantage_N.clamp(-self.advantage_clip, self.advantage_clip)
        parts = {"advantage": advantage_N, "advantage_square": advantage_N.square(), **agreeing}
        return advantage_N, estimate_N, parts | seen


def centred(score_NV: Tensor, log_student_NV: Tensor, labels: Tensor) -> Tensor:
    """Return the labels' scores minus the mean score under the student: [N] nats."""
    return of_labels(score_NV, labels) - mean_under(log_student_NV, score_NV)


def target_policy_gradient(
    target: Target, ce_weight: float = 0.0, advantage_clip: float | None = None, ratio_clip: float | None = 0.2
) -> PolicyGradient:
    """Policy gradient of the reverse KL to a target: ``opd`` to the teacher, ``delta_opd`` to the delta target.

    Args:
        target: any target.
        ce_weight, advantage_clip, ratio_clip: as for ``PolicyGradient``.
    """
    require_kind(target, Target, "loss.target")
    return PolicyGradient(TowardsTarget(target), None, ce_weight, advantage_clip, ratio_clip)


def extrapolated_policy_gradient(
    reference: Literal["student_raw", "teacher_raw"] = "student_raw",
    scale: float = 1.25,
    ce_weight: float = 0.0,
    advantage_clip: float | None = None,
    ratio_clip: float | None = 0.2,
) -> PolicyGradient:
    """ExOPD (arXiv 2602.12125): A = scale (t − r) − (θ − r), centred, which is reverse KL to r + scale (t − r).

    Args:
        reference: r, ``student_raw`` or ``teacher_raw``.
        scale: the factor on the teacher's distance from r; 1 is ``opd``.
        ce_weight, advantage_clip, ratio_clip: as for ``PolicyGradient``.

    Raises:
        ValueError: another reference, or a scale that is not finite.
    """
    if reference not in (STUDENT_RAW, TEACHER_RAW):
        raise ValueError(f"loss.reference is {reference!r}; allowed: {STUDENT_RAW}, {TEACHER_RAW}")
    target = ShiftedTarget(reference, [Shift(Constant(scale, "loss.scale"), TEACHER, reference)], name="scale")
    return target_policy_gradient(target, ce_weight, advantage_clip, ratio_clip)


def agreeing_policy_gradient(
    ce_weight: float = 0.0, advantage_clip: float | None = None, ratio_clip: float | None = 0.2
) -> PolicyGradient:
    """OPD² (arXiv 2607.15161): the teacher's shift as advantage, on tokens where its sign is that of ``opd``.

    The paper takes expectations over the student's 1,024 likeliest tokens; here they are exact.

    Args:
        ce_weight, advantage_clip, ratio_clip: as for ``PolicyGradient``.
    """
    return PolicyGradient(TeacherShift(), TowardsTarget(teacher_target()), ce_weight, advantage_clip, ratio_clip)
