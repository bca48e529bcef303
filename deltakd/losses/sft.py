"""Supervised fine-tuning; if every token is a label, this is plain pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch.nn.functional as F
from torch import Tensor

from deltakd.types import STUDENT, LinearKL, Loss, LossOutput, at_least_float32


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """−log softmax(logits)[label] at τ = 1: [N] nats, at least float32.

    Args:
        logits_NV: [N, V] float.
        labels_N: [N] int64 in [0, V).
    """
    return F.cross_entropy(at_least_float32(logits_NV), labels_N, reduction="none")


@final
class SupervisedFineTuning(Loss):
    """Cross-entropy of the labels under the student, −log softmax(z_s)[label]; reads no reference.

    In training ``deltakd.kernels.fused.fused_chunk`` computes it, value and gradient by hand, unless the student's
    head is soft-capped. ``tests/kernels/test_chunked.py`` shows that the two agree, values and gradients
    (``test_values_and_gradients``).
    """

    ce_weight = 1.0

    @property
    def requires(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    @property
    def fused_form(self) -> LinearKL:
        """λ = 1."""
        return LinearKL({}, temperature=1.0, ce_weight=1.0)

    def __call__(self, logits: Mapping[str, Tensor], labels: Tensor) -> LossOutput:
        """Score N tokens.

        Args:
            logits: ``{"student": [N, V]}``.
            labels: [N] int64.
        """
        ce_N = cross_entropy(logits[STUDENT], labels)
        return LossOutput(ce_N, {"ce": ce_N})
