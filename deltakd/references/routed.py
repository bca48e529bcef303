"""References of which each row has its own pair of teachers: its task says which."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, final

import torch

from deltakd.references.base import RoutedHeads
from deltakd.references.live import LiveReferences
from deltakd.types import STUDENT_RAW, TEACHER, TEACHER_RAW, Batch, Head, TokenStream
from deltakd.types.role_names import teacher_pair


def routed_roles(requires: Collection[str], pairs: Collection[int]) -> list[str]:
    """Return the models behind the roles that a loss reads: the teachers of every pair, and the raw student."""
    found = [role for pair in sorted(set(pairs)) for role in _names(requires, pair).values()]
    return found + ([STUDENT_RAW] if STUDENT_RAW in requires else [])


def names_of_pair(requires: Collection[str], pair: int) -> dict[str, str]:
    """Return role as the loss reads it -> role of the model, for the teachers of a pair and all other roles."""
    return {role: role for role in requires} | _names(requires, pair)


class RolesRun(NamedTuple):
    """Some rows of a batch, and the models that run them.

    Args:
        rows: a route's, or all of the batch.
        roles: of the models.
    """

    rows: TokenStream
    roles: list[str]


def runs_of(batch: Batch, requires: Collection[str]) -> list[RolesRun]:
    """Return who runs which rows of a batch: the raw student all of them, if the loss reads it; each pair its own."""
    own = [RolesRun(batch, [STUDENT_RAW])] if STUDENT_RAW in requires else []
    return own + [RolesRun(route.stream, [*_names(requires, route.pair).values()]) for route in batch.routes]


def in_parts(batch: Batch, requires: Collection[str], heads: Sequence[Mapping[str, Head]]) -> RoutedHeads:
    """Return the heads of a batch in parts, by the names that the loss reads.

    Args:
        batch: whose rows were run.
        requires: the roles that the loss reads, those of the first pair.
        heads: of each of ``runs_of``, role of the model -> head.
    """
    own, teachers = (heads[0], heads[1:]) if STUDENT_RAW in requires else ({}, heads)
    parts = []
    for number, route in enumerate(batch.routes):
        names = _names(requires, route.pair)
        found = {role: head.at(route.tokens) for role, head in own.items()}
        parts.append((route.tokens, found | {read: teachers[number][role] for read, role in names.items()}))
    return RoutedHeads(tuple(parts))


def heads_of_first(heads: Mapping[str, Head], requires: Collection[str], pairs: Collection[int]) -> dict[str, Head]:
    """Return role as the loss reads it -> head, for the first of several pairs.

    Args:
        heads: role of the model -> head.
        requires: the roles that the loss reads.
        pairs: numbers of the pairs.
    """
    return {read: heads[role] for read, role in names_of_pair(requires, min(pairs)).items() if role in heads}


def _names(requires: Collection[str], pair: int) -> dict[str, str]:
    return {
        read: role for read, role in zip((TEACHER, TEACHER_RAW), teacher_pair(pair), strict=True) if read in requires
    }


@final
class RoutedReferences:
    """Live references, of which ``teacher`` and ``teacher_raw`` are another pair for each task.

    Args:
        live: all pairs' models, and the raw student if the loss reads it.
        requires: the roles that the loss reads, those of the first pair.
        pairs: the numbers of the pairs.
    """

    def __init__(self, live: LiveReferences, requires: Collection[str], pairs: Collection[int]) -> None:
        self._live = live
        self._requires = frozenset(requires)
        self._pairs = sorted(set(pairs))

    @property
    def roles(self) -> frozenset[str]:
        return self._requires

    def to(self, device: torch.device) -> None:
        """Move with the student, as ``LiveReferences`` does. Collective if they are sharded."""
        self._live.to(device)

    def empty_heads(self) -> dict[str, Head]:
        """Return role -> head over no tokens, of the first pair's teachers. Call before ``to``."""
        return heads_of_first(self._live.empty_heads(), self._requires, self._pairs)

    def start(self, batch: Batch) -> Callable[[], RoutedHeads]:
        """Start a call, as ``LiveReferences`` does."""
        if self._live.runs_beside_student:
            heads = self(batch)
            return lambda: heads
        there = self._live.sent(batch)
        return lambda: self._heads(batch, there)

    def __call__(self, batch: Batch) -> RoutedHeads:
        """Return the heads of the batch's N valid tokens, in parts."""
        return self._heads(batch, self._live.sent(batch))

    def _heads(self, batch: Batch, there: Batch) -> RoutedHeads:
        heads = [self._live.heads([STUDENT_RAW], batch, there)] if STUDENT_RAW in self._requires else []
        rows = {route.pair: route.stream for route in there.routes}
        for pair in self._pairs:
            roles = _names(self._requires, pair).values()
            if pair in rows:
                heads.append(self._live.heads(roles, batch, rows[pair]))
            elif self._live.is_sharded:
                # Every rank has to take part when a model gathers its layers.
                self._live.heads(roles, batch, _nothing(there))
        return in_parts(batch, self._requires, heads)


def _nothing(batch: TokenStream) -> TokenStream:
    """Return the first position of a batch, as a row without a valid token."""
    first = (batch.input_ids[:1, :1], batch.attention_mask[:1, :1], batch.labels[:1, :1])
    return TokenStream(*first, _valid=first[0].new_empty(0), _real=1)
