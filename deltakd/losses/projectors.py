"""Projectors between the hidden spaces of two models, and cross-model attention (DSKD, arXiv 2406.17328)."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from deltakd.types import AlignedTokens, Head, TokenMap, at_least_float32, in_float64


@final
class Projectors(nn.Module):
    """Linear maps between two hidden spaces.

    Args:
        student_width, teacher_width: D of both models.
        attends: make the query projector of cross-model attention, too.
    """

    def __init__(self, student_width: int, teacher_width: int, attends: bool) -> None:
        super().__init__()
        self.t2s = nn.Linear(teacher_width, student_width)
        self.s2t = nn.Linear(student_width, teacher_width)
        self.query = nn.Linear(2 * student_width, 2 * teacher_width) if attends else None

    @classmethod
    def made(cls, student: Head, teacher: Head, attends: bool, seed: int) -> Projectors:
        """Return projectors with PyTorch's initial values for linear layers, drawn from a seed."""
        with torch.device("cpu"):
            projectors = cls(student.weight.shape[1], teacher.weight.shape[1], attends)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in projectors.children():
                assert isinstance(layer, nn.Linear)
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
        # In at least float32: the projectors are small, and half-precision updates would be lost.
        return projectors.to(torch.promote_types(student.hidden.dtype, torch.float32))

    @torch.no_grad()
    def start_from_pseudo_inverse(self, student: Head, teacher: Head, token_map: TokenMap) -> None:
        """Keep logits, by least squares over the shared tokens: W_student · t2s ≈ W_teacher, and vice versa (v2)."""
        own = in_float64(student.weight.detach()[token_map.student_shared.to(student.weight.device)]).cpu()
        theirs = in_float64(teacher.weight.detach()[token_map.other_shared.to(teacher.weight.device)]).cpu()
        for layer, to, origin in ((self.t2s, own, theirs), (self.s2t, theirs, own)):
            layer.weight.copy_(torch.linalg.pinv(to.T @ to, hermitian=True) @ (to.T @ origin))
            layer.bias.zero_()

    def to_student(self, hidden_MD: Tensor) -> Tensor:
        """Project the teacher's hidden states into the student's space."""
        return self._applied(self.t2s, hidden_MD)

    def to_teacher(self, hidden_ND: Tensor) -> Tensor:
        """Project the student's hidden states into the teacher's space."""
        return self._applied(self.s2t, hidden_ND)

    def _applied(self, layer: nn.Linear, hidden_ND: Tensor) -> Tensor:
        return layer(hidden_ND.to(layer.weight.dtype))

    def attended(self, student: Head, teacher: Head, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        """Let each token attend to the other side's tokens of its row, and return projected hidden states.

        Queries are projected embeddings of the student's input and label; keys are the teacher's, over their standard
        deviation. Values are projected hidden states, the teacher's with its label's embedding.

        Returns:
            [N, D of the student] and [M, D of the teacher].
        """
        assert self.query is not None, "made without a query projector"
        own_E, their_E = student.weight.detach(), teacher.weight.detach()
        query_ND = self._applied(
            self.query, torch.cat([own_E[tokens.student.previous], own_E[tokens.student.labels]], -1)
        )
        label_MD = at_least_float32(their_E[tokens.other.labels])
        key_MD = torch.cat([at_least_float32(their_E[tokens.other.previous]), label_MD], -1)
        hidden_MD, rows = at_least_float32(teacher.hidden), _rows(tokens)
        # Per row, so that a row's loss does not depend on the rows beside it.
        scaled_M = [
            (_over_std(key_MD[theirs]), _over_std(hidden_MD[theirs]) + _over_std(label_MD[theirs]))
            for _, theirs in rows
        ]
        empty = (key_MD[:0], hidden_MD[:0])
        keys, values = (torch.cat(side) for side in zip(empty, *scaled_M, strict=True))
        to_student_MD, to_teacher_ND = self.to_student(values), self.to_teacher(student.hidden)
        in_student, in_teacher = [to_student_MD[:0]], [to_teacher_ND[:0]]
        for own, theirs in rows:
            scores = query_ND[own] @ keys[theirs].to(query_ND.dtype).T / math.sqrt(2 * teacher.hidden.shape[1])
            in_student.append(
                scores.softmax(-1) @ to_student_MD[theirs] if scores.numel() else _none(own, to_student_MD)
            )
            in_teacher.append(
                scores.T.softmax(-1) @ to_teacher_ND[own] if scores.numel() else _none(theirs, to_teacher_ND)
            )
        return torch.cat(in_student), torch.cat(in_teacher)


def _none(tokens: slice, like: Tensor) -> Tensor:
    """Zeros for tokens whose row is empty on the other side."""
    return like.new_zeros(tokens.stop - tokens.start, like.shape[1])


def _over_std(values: Tensor) -> Tensor:
    return values / values.std() if values.numel() > 1 else values


def _rows(tokens: AlignedTokens) -> list[tuple[slice, slice]]:
    """Return each row's tokens on both sides."""
    sides = [tokens.student.rows, tokens.other.rows]
    count = 1 + max((int(side[-1]) for side in sides if len(side)), default=-1)
    counts = torch.stack([torch.bincount(side, minlength=count) for side in sides]).cpu()
    ends = counts.cumsum(1)
    return [
        (slice(a - n, a), slice(b - m, b))
        for a, n, b, m in zip(*(side.tolist() for pair in zip(ends, counts, strict=True) for side in pair), strict=True)
    ]
