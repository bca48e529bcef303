"""Two invented sets of models that make shifts hard: heads over shared contexts, everything drawn from one seed.

A context is x ~ N(0, I). Every model's logits are linear in (a part of) x around Zipf-like log frequencies; the raw
student differs from the raw teacher, and the teacher from the raw teacher, by more nats in the tail than in the head of
the vocabulary, as models that have seen a token a hundred times do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltakd.types import STUDENT, STUDENT_RAW, TEACHER, TEACHER_RAW, Head

TEACHER_WIDTH, STUDENT_WIDTH = 48, 24


@dataclass(frozen=True)
class World:
    """Heads of all models over training and held-out contexts.

    Args:
        weights: role -> [V, width + 1], the last column the bias.
        train, held_out: [N, TEACHER_WIDTH + 1] contexts, the last column 1.
    """

    weights: dict[str, Tensor]
    train: Tensor
    held_out: Tensor

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.weights[TEACHER])

    def untrained(self, trained: str) -> Tensor:
        """Return the tensor to train: the raw student's ``head`` [V, D], or a linear ``body`` [D, D] before it."""
        weight_VD = self.weights[STUDENT_RAW]
        return weight_VD.clone() if trained == "head" else torch.eye(weight_VD.shape[1])

    def heads(self, contexts_ND: Tensor, parameter: Tensor) -> dict[str, Head]:
        """Return role -> head over the contexts; ``parameter`` is the student's head, or its body if square."""
        narrow_ND = torch.cat([contexts_ND[:, :STUDENT_WIDTH], contexts_ND[:, -1:]], 1)
        heads = {
            role: Head(narrow_ND if role == STUDENT_RAW else contexts_ND, weight)
            for role, weight in self.weights.items()
        }
        is_body = len(parameter) == narrow_ND.shape[1]
        own = Head(narrow_ND @ parameter, self.weights[STUDENT_RAW]) if is_body else Head(narrow_ND, parameter)
        return heads | {STUDENT: own}


def heavy_tail(vocabulary: int = 50_257, seed: int = 0) -> World:
    """Make a world with a large vocabulary, most of which no model would ever say."""
    draw = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, vocabulary + 1, dtype=torch.float32)
    rarity = (rank.log() / torch.tensor(float(vocabulary)).log())[:, None]
    frequency = -1.2 * rank.log()[:, None]

    def noise(size: float, tail: float, width: int) -> Tensor:
        """Slopes and bias whose effect on a logit has the standard deviation ``size``, plus ``tail`` at the end."""
        scale = size + tail * rarity
        slopes = torch.randn(vocabulary, width, generator=draw) * scale / width**0.5
        return torch.cat([slopes, torch.randn(vocabulary, 1, generator=draw) * scale], 1)

    shared = noise(2.5, 0.0, TEACHER_WIDTH)
    shared[:, -1:] = frequency
    narrow = torch.cat([shared[:, :STUDENT_WIDTH] * (TEACHER_WIDTH / STUDENT_WIDTH) ** 0.5, shared[:, -1:]], 1)
    learnt = (torch.rand(vocabulary, 1, generator=draw) < 0.02) * 2.0
    weights = {
        TEACHER_RAW: shared + noise(0.2, 0.8, TEACHER_WIDTH),
        STUDENT_RAW: narrow + noise(0.3, 1.2, STUDENT_WIDTH),
    }
    for name, other in (("", 0), ("_2", 1)):
        raw = weights[TEACHER_RAW] if other == 0 else shared + noise(0.2, 0.8, TEACHER_WIDTH)
        tuned = raw + noise(0.3, 0.5, TEACHER_WIDTH)
        tuned[:, -1:] += learnt
        weights |= {TEACHER + name: tuned, TEACHER_RAW + name: raw}
    contexts_ND = torch.cat([torch.randn(1024, TEACHER_WIDTH, generator=draw), torch.ones(1024, 1)], 1)
    return World(weights, contexts_ND[:768], contexts_ND[768:])


def unseen_token(vocabulary: int = 1_000, seed: int = 0) -> World:
    """Make a world with a small vocabulary, whose last token has e^-30 under the raw teachers in every context.

    Fine-tuning moves it to about e^-23 in the teachers (still nothing that is ever said); the raw student gives it
    about e^-9.
    """
    world = heavy_tail(vocabulary, seed)
    levels = {TEACHER_RAW: -30.0, TEACHER: -23.0, STUDENT_RAW: -9.0}
    levels |= {f"{role}_2": levels[role] for role in (TEACHER, TEACHER_RAW)}
    contexts_ND = torch.cat([world.train, world.held_out])
    weights = {}
    for role, weight in world.weights.items():
        changed = weight.clone()
        # The log-normaliser hardly moves with a token this rare: its mean over the contexts makes the bias.
        level = Head(contexts_ND[:, -changed.shape[1] :], changed).logits()[:, :-1].logsumexp(-1).mean()
        changed[-1] = 0.0
        changed[-1, -1] = levels[role] + level
        weights[role] = changed
    return World(weights, world.train, world.held_out)
