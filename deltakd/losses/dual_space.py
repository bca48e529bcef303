"""Dual-space distillation: hidden states projected into the other model's space (docs/design.md#two-tokenizers)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltakd.losses.divergences import Divergence, ForwardKL
from deltakd.losses.mixing import tempered, tempered_student
from deltakd.losses.projectors import Projectors
from deltakd.losses.span_mixture import SpanMixture
from deltakd.losses.spans import tokens_of
from deltakd.types import STUDENT, TEACHER, AlignedTokens, Head, TokenMap, at_least_float32, require_kind

ALIGNMENTS = ("attention", "exact")
INITIAL = ("random", "pseudo_inverse")

#: Derived heads: the teacher's hidden states in the student's space, over N tokens, and vice versa.
IN_STUDENT, IN_TEACHER = "student.of_teacher", "teacher.of_student"


@final
class DualSpaceDistillation(SpanMixture):
    """λ · CE(labels) + (1 − λ) · [CE of the projected teacher + D in the student's space + D in the teacher's space].

    DSKD (arXiv 2406.17328, cross-model attention) and DSKDv2 (arXiv 2504.11426, exact alignment). Hidden states of each
    model are projected into the other's space and multiplied by its output embedding, so that both distributions have
    one vocabulary. The projectors are trained with the student and are no part of the exported model.

    ``attention``: each token of one side attends to the other side's tokens of its row, by the embeddings of their
    inputs and labels. The projected teacher learns the student's labels; where it gets them right, the student matches
    it. In the teacher's space the projected student matches the teacher under forward KL.

    ``exact``: the tokens of spans with one token on each side are compared. The projected teacher learns what the
    teacher itself finds most likely, if the student has that token; where it does, the student matches it. Both spaces
    use D.

    Differences from the published code (songmzhang/DSKD, DSKDv2): every term is divided by the student's tokens of the
    optimiser step, not by the aligned or agreeing tokens of a micro-batch; standard deviations in the attention are
    those of a row's response, so that no row depends on its batch; embeddings are those of the output; projectors
    started from a pseudo-inverse are trained from there, in both directions.

    Args:
        divergence: D.
        alignment: ``attention`` or ``exact``.
        projector_init: ``random``, or ``pseudo_inverse``: the projected hidden states give, by least squares over the
            shared tokens, the logits that they gave before.
        projector_lr: peak learning rate of the projectors.
        temperature: τ.
        ce_weight: λ.
        temperature_squared: multiply the term by τ².

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        divergence: Divergence,
        alignment: str = "attention",
        projector_init: str = "random",
        projector_lr: float = 1e-3,
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, ce_weight, temperature_squared)
        require_kind(divergence, Divergence, "loss.divergence")
        problems = [
            f"loss.{key} is {given!r}; allowed: {', '.join(allowed)}"
            for key, given, allowed in (
                ("alignment", alignment, ALIGNMENTS),
                ("projector_init", projector_init, INITIAL),
            )
            if given not in allowed
        ]
        if not 0 < projector_lr < math.inf:
            problems.append(f"loss.projector_lr is {projector_lr}; it must be a finite number above 0")
        if problems:
            raise ValueError("; ".join(problems))
        self.divergence = divergence
        self.alignment = alignment
        self.projector_init = projector_init
        self.trainable_lr = float(projector_lr)
        self._projectors: Projectors | None = None

    @property
    def trainable(self) -> nn.Module | None:  # type: ignore[override]
        """The projectors; none at λ = 1."""
        return self._projectors

    @property
    def term_requires(self) -> frozenset[str]:
        """The teacher."""
        return frozenset({TEACHER})

    def prepare(self, heads: Mapping[str, Head], token_map: TokenMap, seed: int) -> nn.Module | None:
        """Make the projectors."""
        if self.needs_alignment:
            query = self.alignment == "attention"
            self._projectors = Projectors.made(heads[STUDENT], heads[TEACHER], query, seed)
            if self.projector_init == "pseudo_inverse":
                self._projectors.start_from_pseudo_inverse(heads[STUDENT], heads[TEACHER], token_map)
        return self.trainable

    def derived_heads(self, heads: Mapping[str, Head], tokens: AlignedTokens) -> Mapping[str, Head]:
        """Return the teacher in the student's space, over N tokens, and the student in the teacher's, over M."""
        assert self._projectors is not None, "prepare was not called"
        student, teacher = heads[STUDENT], heads[TEACHER]
        if self.alignment == "attention":
            to_student, to_teacher = self._projectors.attended(student, teacher, tokens)
        else:
            to_student, to_teacher = _exact(self._projectors, student, teacher, tokens)
        frozen = replace(
            student, weight=student.weight.detach(), bias=None if student.bias is None else student.bias.detach()
        )
        return {IN_STUDENT: replace(frozen, hidden=to_student), IN_TEACHER: replace(teacher, hidden=to_teacher)}

    def term(self, logits: Mapping[str, Tensor], log_student_NV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """In the student's space: [N]."""
        tokens = tokens_of(logits)
        projected_NV = logits[IN_STUDENT]
        wanted_N = tokens.student.labels if self.alignment == "attention" else _wanted(logits[TEACHER], tokens)
        known_N = wanted_N >= 0
        target_N = wanted_N.clamp_min(0)
        ce_N = F.cross_entropy(projected_NV, target_N, reduction="none").masked_fill(~known_N, 0.0)
        agrees_N = known_N & (projected_NV.detach().argmax(-1) == target_N)
        log_p_NV = tempered(projected_NV.detach(), self.temperature)
        kd_N = self.divergence(log_p_NV, tempered_student(log_student_NV, self.temperature))
        kd_N = kd_N.masked_fill(~agrees_N, 0.0)
        return ce_N + kd_N, {"projected_ce": ce_N, "student_space": kd_N, "projected_agreement": agrees_N.to(kd_N)}

    def other_term(self, logits: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """In the teacher's space: [M]."""
        tokens = tokens_of(logits)
        log_p_MV, log_q_MV = (tempered(logits[name], self.temperature) for name in (TEACHER, IN_TEACHER))
        if self.alignment == "attention":
            value_M = ForwardKL()(log_p_MV.detach(), log_q_MV)
        else:
            value_M = self.divergence(log_p_MV.detach(), log_q_MV)
            own_K, other_K = _pairs(tokens)
            known_K = _wanted(logits[TEACHER], tokens)[own_K] >= 0
            counts_M = torch.zeros_like(value_M, dtype=torch.bool).index_copy(0, other_K, known_K)
            value_M = value_M.masked_fill(~counts_M, 0.0)
        return value_M, {"teacher_space": value_M}


def _pairs(tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
    """Return the tokens of spans with one token on each side: [P] indices into N, and into M."""
    borders = tokens.alignment.borders
    alone = (borders[:, 1] - borders[:, 0] == 1) & (borders[:, 3] - borders[:, 2] == 1)
    device = tokens.student.labels.device
    return borders[alone, 0].to(device, non_blocking=True), borders[alone, 2].to(device, non_blocking=True)


def _wanted(teacher_MV: Tensor, tokens: AlignedTokens) -> Tensor:
    """Return the teacher's most likely token in the student's vocabulary: [N]; −1: no pair, or not shared."""
    own_P, other_P = _pairs(tokens)
    token_map = tokens.token_map
    shared_V = torch.full_like(token_map.student_of_other, -1)
    shared_V[token_map.other_shared] = token_map.student_shared
    best_P = shared_V[teacher_MV.detach()[other_P].argmax(-1)]
    return torch.full_like(tokens.student.labels, -1).index_copy(0, own_P, best_P)


def _exact(projectors: Projectors, student: Head, teacher: Head, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
    """Return projected hidden states of pairs, laid on the other side's tokens; 0 elsewhere."""
    own_P, other_P = _pairs(tokens)
    to_student_PD = projectors.to_student(teacher.hidden[other_P])
    to_teacher_PD = projectors.to_teacher(student.hidden[own_P])
    return (
        _zeros(len(student), to_student_PD).index_copy(0, own_P, to_student_PD),
        _zeros(len(teacher), to_teacher_PD).index_copy(0, other_P, to_teacher_PD),
    )


def _zeros(count: int, like: Tensor) -> Tensor:
    return at_least_float32(like).new_zeros(count, like.shape[1], dtype=like.dtype)
