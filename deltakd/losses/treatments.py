"""Treatments of a shift: they keep the tail of the vocabulary from dominating (docs/design.md#targets)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from deltakd.types import TEACHER, at_least_float32, is_reference_role

LogProbs = Mapping[str, Tensor]


@final
@dataclass(frozen=True)
class Treatment:
    """Centre, clip and mask a shift δ = log p_a − log p_b, in this order, at τ = 1; each is off if it is None.

    Args:
        centre: a reference's role: subtract the mean of δ under its probabilities.
        clip: c > 0: bound δ to [−c, c].
        mask: m in (0, 1]: a token is plausible if p_ref ≥ m · max p_ref (contrastive decoding, arXiv 2210.15097, uses
            m = 0.1). The loss decides how to treat the others: a target with a base sets δ = 0, a ratio loss leaves
            them out of both sides.
        mask_by: the role that gives p_ref.

    Raises:
        ValueError: a setting is out of range; all of them are named.
    """

    centre: str | None = None
    clip: float | None = None
    mask: float | None = None
    mask_by: str = TEACHER

    def __post_init__(self) -> None:
        problems = [
            f"treatment.{key} is {role!r}; allowed: teacher, teacher_raw, student_raw, or a numbered teacher"
            for key, role in (("centre", self.centre), ("mask_by", self.mask_by))
            if role is not None and not is_reference_role(role)
        ]
        if self.clip is not None and not (0 < self.clip < math.inf):
            problems.append(f"treatment.clip is {self.clip}; it must be a finite number of nats above 0, or null")
        if self.mask is not None and not (0 < self.mask <= 1):
            problems.append(f"treatment.mask is {self.mask}; it must be above 0 and at most 1, or null")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def is_off(self) -> bool:
        """True if it changes nothing."""
        return self.centre is None and self.clip is None and self.mask is None

    @property
    def requires(self) -> frozenset[str]:
        """The roles whose probabilities it reads."""
        by = {self.mask_by} if self.mask is not None else set()
        return frozenset(by if self.centre is None else by | {self.centre})

    @property
    def whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """As for ``Loss``: a mask compares single tokens, and all treatments act on log-probs at τ = 1.

        A top-K store holds log-probs at the loss's temperature only.
        """
        return () if self.is_off else ("a treatment of a shift acts on single tokens at temperature 1",)

    def __call__(self, shift_NV: Tensor, log_probs: LogProbs) -> Tensor:
        """Centre and clip a shift: [N, V] nats; ``log_probs`` holds the roles in ``requires``."""
        if self.centre is not None:
            mean_N1 = (log_probs[self.centre].exp() * shift_NV).sum(-1, keepdim=True)
            shift_NV = shift_NV - mean_N1
        return shift_NV if self.clip is None else shift_NV.clamp(-self.clip, self.clip)

    def implausible(self, log_probs: LogProbs) -> Tensor | None:
        """[N, V] bool, True for tokens that the mask removes; None without a mask."""
        if self.mask is None:
            return None
        log_p_NV = log_probs[self.mask_by]
        return log_p_NV < log_p_NV.amax(-1, keepdim=True) + math.log(self.mask)


NO_TREATMENT = Treatment()


@torch.no_grad()
def log_probs_of(roles: frozenset[str] | set[str], logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Role -> log-probs [N, V] at τ = 1, detached, in at least float32."""
    return {role: at_least_float32(logits[role].detach()).log_softmax(-1) for role in sorted(roles)}


def difference(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """log a − log b: [N, V] nats; 0 if either rules the token out, since there is then no shift."""
    return (log_a_NV - log_b_NV).masked_fill(torch.isneginf(log_a_NV) | torch.isneginf(log_b_NV), 0.0)


def ruled_out(roles: Iterable[str], logits: Mapping[str, Tensor]) -> Tensor:
    """[N, V] bool, True for tokens to which any of the roles gives a logit of −inf."""
    masks = [torch.isneginf(logits[role].detach()) for role in roles]
    return torch.stack(masks).any(0)
