"""The base of losses of whole responses that read a target, beside the labels' cross-entropy."""

from __future__ import annotations

from deltakd.losses.targets import ReadsTarget, Target
from deltakd.types import SequenceLoss, require_kind


class TargetSequenceLoss(ReadsTarget, SequenceLoss):
    """λ · CE(labels) + (1 − λ) · a term that compares each response with a target.

    Args:
        target: what the term reads of the references.
        ce_weight: λ in [0, 1], checked by the subclass. At 1 no reference is read.

    Raises:
        ValueError: the target is none.
    """

    def __init__(self, target: Target, ce_weight: float) -> None:
        require_kind(target, Target, "loss.target")
        self.target = target
        self.ce_weight = float(ce_weight)

    @property
    def requires(self) -> frozenset[str]:
        """The references that the target reads; none if λ = 1."""
        return frozenset() if self.ce_weight == 1.0 else self.target.requires
