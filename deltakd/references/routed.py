"""References of which each row has its own pair of teachers: its task says which."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import final

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
        heads = self._live.empty_heads()
        own = {role: heads[role] for role in self._requires if role in heads}
        return own | {read: heads[role] for read, role in _names(self._requires, self._pairs[0]).items()}

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
        own = self._live.heads([STUDENT_RAW], batch, there) if STUDENT_RAW in self._requires else {}
        routes = {route.pair: route for route in there.routes}
        by_pair: dict[int, dict[str, Head]] = {}
        for pair in self._pairs:
            names = _names(self._requires, pair)
            if pair in routes:
                heads = self._live.heads(names.values(), batch, routes[pair].stream)
                by_pair[pair] = {read: heads[role] for read, role in names.items()}
            elif self._live.is_sharded:
                # Every rank has to take part when a model gathers its layers.
                self._live.heads(names.values(), batch, _nothing(there))
        return RoutedHeads(
            tuple(
                (route.tokens, {role: head.at(route.tokens) for role, head in own.items()} | by_pair[route.pair])
                for route in batch.routes
            )
        )


def _nothing(batch: TokenStream) -> TokenStream:
    """Return the first position of a batch, as a row without a valid token."""
    first = (batch.input_ids[:1, :1], batch.attention_mask[:1, :1], batch.labels[:1, :1])
    return TokenStream(*first, _valid=first[0].new_empty(0), _real=1)
