"""Which tokens of two tokenizers cover the same text, in a micro-batch and in the vocabularies."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

#: The span of a token that could not be aligned.
UNALIGNED = -1


# Not frozen: it travels inside batches, in which Lightning replaces the tensors of every dataclass under DeepSpeed.
@dataclass
class Alignment:
    """The spans that cover the text of a micro-batch's responses in two tokenizers.

    A span is a shortest stretch of response text that starts and ends at a token border on both sides. Spans are
    numbered from 0 in the order of the text, and never cross rows. Every span has at least one token on each side; its
    tokens are neighbours.

    Args:
        student_spans: [N] int64, the span of each of the student's valid tokens, ascending; UNALIGNED for a token
            whose text the other side lacks.
        other_spans: [M] int64, the same for the teachers' tokens.
        count: K, number of spans.
        borders: [K, 4] int64 on the CPU: where the tokens of each span start and stop, among N and among M.
    """

    student_spans: Tensor
    other_spans: Tensor
    count: int
    borders: Tensor

    @classmethod
    def of(cls, student_spans: Tensor, other_spans: Tensor) -> Alignment:
        """Make an alignment on the CPU from the spans of both sides' tokens."""
        count = 1 + max(student_spans.tolist(), default=UNALIGNED)
        borders = torch.stack([column for spans in (student_spans, other_spans) for column in _bounds(spans, count)], 1)
        return cls(student_spans, other_spans, count, borders)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Alignment:
        """Return the alignment with its spans on ``device``; the borders stay on the CPU, where chunks are cut."""
        return Alignment(
            self.student_spans.to(device, non_blocking=non_blocking),
            self.other_spans.to(device, non_blocking=non_blocking),
            self.count,
            self.borders,
        )

    @property
    def aligned_tokens(self) -> int:
        """Number of the student's tokens that lie in a span."""
        return int((self.borders[:, 1] - self.borders[:, 0]).sum())

    def chunks(self, size: int) -> Iterator[tuple[slice, slice]]:
        """Yield (tokens of the student, tokens of the other side) of chunks that cut no span, in order.

        A chunk has at most ``size`` tokens on each side, unless a single span has more.
        """
        at, end = (0, 0), (len(self.student_spans), len(self.other_spans))
        while at != end:
            stop = self._next_cut(at, end, size)
            yield slice(at[0], stop[0]), slice(at[1], stop[1])
            at = stop

    def part(self, student: slice, other: slice) -> Alignment:
        """Return the alignment of one chunk, its spans numbered from 0."""
        first, last = self._ended(0, student.start), self._ended(0, student.stop)
        starts = torch.tensor([student.start, student.start, other.start, other.start])
        return Alignment(
            _renumbered(self.student_spans[student], first),
            _renumbered(self.other_spans[other], first),
            last - first,
            self.borders[first:last] - starts,
        )

    def _next_cut(self, at: tuple[int, int], end: tuple[int, int], size: int) -> tuple[int, int]:
        """Return where the chunk that begins at ``at`` stops, in tokens of both sides."""
        fitting = min(self._ended(side, at[side] + size) for side in (0, 1))
        begun = self._ended(0, at[0])
        if fitting > begun:
            return int(self.borders[fitting - 1, 1]), int(self.borders[fitting - 1, 3])
        # Before the next span, tokens that no span holds may be cut anywhere.
        ahead = (int(self.borders[begun, 0]), int(self.borders[begun, 2])) if begun < self.count else end
        if ahead != at:
            return min(ahead[0], at[0] + size), min(ahead[1], at[1] + size)
        return int(self.borders[begun, 1]), int(self.borders[begun, 3])

    def _ended(self, side: int, at: int) -> int:
        """Return the number of spans whose tokens on a side stop at ``at`` or before."""
        return bisect_right(self._stops[side], at)

    @cached_property
    def _stops(self) -> tuple[list[int], list[int]]:
        return self.borders[:, 1].tolist(), self.borders[:, 3].tolist()


def _bounds(spans: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return where the tokens of each span start and stop."""
    places = torch.nonzero(spans >= 0).flatten()
    lengths = torch.bincount(spans[places], minlength=count)
    assert len(lengths) == count, "both sides have the same spans"
    assert bool((lengths > 0).all()), "every span has a token on each side"
    stops = lengths.cumsum(0)
    return places[stops - lengths], places[stops - 1] + 1


def _renumbered(spans: Tensor, first: int) -> Tensor:
    return torch.where(spans >= 0, spans - first, spans)


@dataclass(frozen=True)
class TokenMap:
    """How the tokens of two vocabularies correspond, by their bytes; special tokens by their function (EOS to EOS).

    Args:
        student_shared, other_shared: [P] int64, ids of the tokens that both have, in pairs, ascending in the first.
        student_of_other: [V of the teachers] int64: the student's token with which the text of each of the teachers'
            tokens begins: the same token where both have it, else its longest proper prefix; −1: none.
        other_of_student: [V of the student] int64, the same the other way round.
    """

    student_shared: Tensor
    other_shared: Tensor
    student_of_other: Tensor
    other_of_student: Tensor

    def to(self, device: torch.device | str) -> TokenMap:
        """Return the map on ``device``."""
        return TokenMap(*(getattr(self, field.name).to(device) for field in fields(self)))

    @classmethod
    def identity(cls, vocabulary: int) -> TokenMap:
        """Return the map of a vocabulary onto itself."""
        ids = torch.arange(vocabulary)
        return cls(ids, ids, ids, ids)

    @cached_property
    def student_rest(self) -> Tensor:
        """[R] int64, ascending: the student's tokens that the teachers lack."""
        return _others(self.student_shared, len(self.other_of_student))

    @cached_property
    def other_rest(self) -> Tensor:
        """[R] int64, ascending: the teachers' tokens that the student lacks."""
        return _others(self.other_shared, len(self.student_of_other))


def _others(ids: Tensor, vocabulary: int) -> Tensor:
    kept = torch.ones(vocabulary, dtype=torch.bool, device=ids.device)
    kept[ids] = False
    return torch.where(kept)[0]
