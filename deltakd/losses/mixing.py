"""The base of all distillation losses: cross-entropy of the labels, mixed with a loss-specific term."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import final

import torch.nn.functional as F
from torch import Tensor

from deltakd.types import STUDENT, LinearKL, Loss, LossOutput, at_least_float32


class LabelMixture(Loss):
    """λ · CE(labels) + (1 − λ) · term, per token (arXiv 2509.14526; docs/design.md#delta-kd). CE is always at τ = 1.

    Args:
        temperature: τ > 0, of the term.
        ce_weight: λ in [0, 1]. At 1 the term is not computed and no reference is read: the loss is then SFT.
        temperature_squared: multiply the term by τ², which keeps the size of its gradient as τ grows.

    Raises:
        ValueError: temperature or ce_weight is out of range.
    """

    def __init__(self, temperature: float = 1.0, ce_weight: float = 0.5, temperature_squared: bool = False) -> None:
        problems = []
        if not (0 < temperature < float("inf")):
            problems.append(f"loss.temperature is {temperature}; it must be a finite number above 0")
        if not (0 <= ce_weight <= 1):
            problems.append(f"loss.ce_weight is {ce_weight}; it must be between 0 (no labels) and 1 (labels only)")
        if problems:
            raise ValueError("; ".join(problems))
        self.temperature = float(temperature)
        self.ce_weight = float(ce_weight)
        self.temperature_squared = temperature_squared

    @property
    @abstractmethod
    def term_requires(self) -> frozenset[str]:
        """The references that the term reads."""

    @property
    def term_whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """``whole_vocabulary_reasons`` of the term."""
        return ()

    @abstractmethod
    def term(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the term, without λ and τ².

        Args:
            logits: role -> [N, V].
            log_student_NV: the student's log-probs at τ = 1, at least float32.

        Returns:
            [N] nats, and its parts by name, [N] each.
        """

    def other_term(self, logits: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]] | None:
        """As ``term``, on the teachers' M tokens, in a loss of two tokenizers; None: it has no such values."""
        return None

    @property
    def fused_form(self) -> LinearKL | None:
        """The form that a kernel computes by hand, if the term has one; at λ = 1 every loss has one."""
        return LinearKL({}, 1.0, 1.0) if self.ce_weight == 1.0 else self._fused_term()

    @property
    @final
    def distillation_term(self) -> Loss:
        """The term alone, λ = 0; with the same schedules."""
        alone = copy.copy(self)
        alone.ce_weight = 0.0
        return alone

    def _fused_term(self) -> LinearKL | None:
        return None

    @property
    @final
    def whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """Reasons of the term; none if λ = 1."""
        return () if self.ce_weight == 1.0 else self.term_whole_vocabulary_reasons

    @property
    @final
    def requires(self) -> frozenset[str]:
        """The references that the loss reads; none if λ = 1."""
        return frozenset() if self.ce_weight == 1.0 else self.term_requires

    @final
    def __call__(self, logits: Mapping[str, Tensor], labels: Tensor) -> LossOutput:
        """Score N tokens.

        Args:
            logits: role -> [N, V] float, for ``student`` and every role in ``requires``. A mapping over a reduced
                vocabulary at τ also has a method ``cross_entropy(labels)`` -> [N] nats, because CE is at τ = 1.
            labels: [N] int64.

        Returns:
            per_token [N] nats; parts: ``ce`` (at τ = 1) and those of the term.
        """
        log_student_NV = at_least_float32(logits[STUDENT]).log_softmax(-1)
        exact = getattr(logits, "cross_entropy", None)
        ce_N = F.nll_loss(log_student_NV, labels, reduction="none") if exact is None else exact(labels)
        if self.ce_weight == 1.0:
            return LossOutput(ce_N, {"ce": ce_N})
        term_N, parts = self.term(logits, log_student_NV)
        scale = self.temperature**2 if self.temperature_squared else 1.0
        per_token_N = (1 - self.ce_weight) * scale * term_N
        # λ = 0 must not multiply an infinite CE by 0.
        if self.ce_weight > 0:
            per_token_N = self.ce_weight * ce_N + per_token_N
        other = self.other_term(logits)
        if other is None:
            return LossOutput(per_token_N, {"ce": ce_N, **parts})
        other_M, other_parts = other
        return LossOutput(per_token_N, {"ce": ce_N, **parts, **other_parts}, (1 - self.ce_weight) * scale * other_M)


def tempered_student(log_student_NV: Tensor, temperature: float) -> Tensor:
    """The student's log-probs at τ from those at τ = 1: [N, V]. At τ = 1 they are already normalised."""
    return log_student_NV if temperature == 1.0 else tempered(log_student_NV, temperature)


def tempered(logits_NV: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / τ): [N, V]."""
    return (logits_NV if temperature == 1.0 else logits_NV / temperature).log_softmax(-1)
