"""Scores: the worth of each token to a policy gradient, before centring (docs/design.md#on-policy)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from deltakd.losses.divergences import kl, log_ratio
from deltakd.losses.sampled import mean_under
from deltakd.losses.targets import ReadsTarget, Target
from deltakd.types import TEACHER, TEACHER_RAW, Schedule


class Score(ABC):
    """A value in nats for every token, from the models' logits. To write your own, subclass it."""

    #: The name under which its estimate is logged.
    name: str

    @property
    @abstractmethod
    def requires(self) -> frozenset[str]:
        """The references whose logits it reads."""

    @abstractmethod
    def __call__(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> Tensor:
        """[N, V] nats, detached; a constant per row has no effect, because scores are centred.

        Args:
            logits: role -> [N, V].
            log_student_NV: the student's log-probs at τ = 1, at least float32, detached.
        """

    @abstractmethod
    def estimate(self, score_NV: Tensor, log_student_NV: Tensor) -> Tensor:
        """[N] nats: the quantity that following the score minimises, exact over the vocabulary."""

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The numbers that change with training, by the name under which they are logged."""
        return {}

    @property
    def teacher_factor(self) -> float:
        """As for a ``Target``."""
        return 1.0


@final
class TowardsTarget(ReadsTarget, Score):
    """log p_target − log π_θ: following it is reverse KL to the target, token by token.

    That is identity (a) of docs/design.md#on-policy.

    Args:
        target: the student's target: the teacher (OPD), an extrapolated teacher (ExOPD), or the delta target.
    """

    name = "reverse_kl"

    def __init__(self, target: Target) -> None:
        self.target = target

    @property
    def requires(self) -> frozenset[str]:
        return self.target.requires

    @torch.no_grad()
    def __call__(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> Tensor:
        """[N, V] nats."""
        return log_ratio(self.target(logits).log_softmax(-1), log_student_NV)

    def estimate(self, score_NV: Tensor, log_student_NV: Tensor) -> Tensor:
        """KL(π_θ ‖ target), [N] nats."""
        return kl(log_student_NV, score_NV + log_student_NV)


@final
class TeacherShift(Score):
    """log p_t − log p_t0: the teacher's shift as a reward (OPD², arXiv 2607.15161)."""

    name = "lost_shift"
    requires = frozenset({TEACHER, TEACHER_RAW})

    @torch.no_grad()
    def __call__(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> Tensor:
        """[N, V] nats."""
        return log_ratio(logits[TEACHER].log_softmax(-1), logits[TEACHER_RAW].log_softmax(-1))

    def estimate(self, score_NV: Tensor, log_student_NV: Tensor) -> Tensor:
        """−E_θ[log p_t − log p_t0], [N] nats: minus the expected reward."""
        return -mean_under(log_student_NV, score_NV)
