"""Targets: the distribution that the student should match, as logits from the references' logits (DESIGN 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, final

from torch import Tensor

from deltakd.types import STUDENT_RAW, TEACHER, TEACHER_RAW, at_least_float32


class Target(Protocol):
    """Turns the references' logits into target logits.

    A target that is linear in the logits has ``coefficients``: role -> factor. They say all there is to know of it,
    so that a kernel can fuse the composition into the products with the heads.
    """

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Role -> factor on its logits; roles with factor 0 are left out."""
        ...


@final
class TeacherTarget:
    """z = z_t: plain token-level distillation (Hinton et al., arXiv 1503.02531)."""

    @property
    def coefficients(self) -> Mapping[str, float]:
        """The teacher alone."""
        return {TEACHER: 1.0}


@final
class DeltaTarget:
    """z = z_t + α (z_s0 − z_t0): the paper's target (arXiv 2509.14526; DESIGN 3.1).

    Args:
        alpha: α, the delta weight. 0 is the teacher itself, and then no raw model is read; 1 is the raw student
            plus the whole shift of the teacher's fine-tuning.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = float(alpha)

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Teacher, raw student and raw teacher; the teacher alone at α = 0."""
        if self.alpha == 0.0:
            return {TEACHER: 1.0}
        return {TEACHER: 1.0, STUDENT_RAW: self.alpha, TEACHER_RAW: -self.alpha}


def compose(coefficients: Mapping[str, float], logits: Mapping[str, Tensor]) -> Tensor:
    """Σ coefficient · logits over the roles, detached: [N, V] in at least float32.

    A constant per row in any model's logits changes no distribution, so raw logits stand for log-probs.

    Raises:
        ValueError: a role that the target reads is missing.
    """
    missing = [role for role in coefficients if role not in logits]
    if missing:
        raise ValueError(f"the target reads {sorted(coefficients)}, but logits were given for {sorted(logits)} only")
    total: Tensor | None = None
    for role, factor in coefficients.items():
        term_NV = at_least_float32(logits[role].detach())
        if factor != 1.0:
            term_NV = factor * term_NV
        total = term_NV if total is None else total + term_NV
    assert total is not None, "a target without references"
    return total
