"""Tokenised rows, held compactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from deltakd.data.encoding.images import RowImages, SetImages
from deltakd.types import IGNORE_INDEX

_ROWS_AT_ONCE = 10_000
#: The route of rows without a task, and of tasks without a route of their own.
ANY_TASK = "*"


def pair_of(task: str | None, routes: Mapping[str, int]) -> int | None:
    """Return the number of the pair of teachers that judges the rows of a task; None: ``model.routes`` lacks it."""
    return routes.get(ANY_TASK if task is None or task not in routes else task)


@dataclass
class Encoded:
    """One tokenised row.

    Args:
        input_ids: T token ids, prompt and response.
        labels: T labels, not shifted: the token itself if trained, else IGNORE_INDEX.
        row_id: the row's number in its data set.
        route: number of the pair of teachers that judges the row, from 1; None: rows are not routed.
        spans: T numbers, the span of each token, from 0 in each row, or UNALIGNED; None: there is one tokenizer.
        other: the row in the teachers' tokenizer, with the same spans; None: there is one tokenizer.
        images: what its image tokens stand for; None: it has none.
    """

    input_ids: list[int]
    labels: list[int]
    row_id: int
    route: int | None = None
    spans: list[int] | None = None
    other: Encoded | None = None
    images: RowImages | None = None


@dataclass(frozen=True, eq=False)
class RowTasks:
    """The tasks of a set's rows, and the pairs of teachers that judge them.

    Args:
        numbers: [n] int32, the place of each row's task in ``names``.
        names: of the tasks; None: rows without one.
        routes: of each task, the number of its pair of teachers, from 1; None: it has none, or rows are not routed.
    """

    numbers: NDArray[np.int32]
    names: tuple[str | None, ...]
    routes: tuple[int | None, ...]

    @property
    def routed(self) -> bool:
        """True if tasks have pairs of teachers of their own."""
        return any(route is not None for route in self.routes)

    def route(self, index: int) -> int | None:
        """Return the number of the pair that judges a row."""
        return self.routes[self.numbers[index]]

    @property
    def pairs(self) -> NDArray[np.int64]:
        """[n]: the number of the pair that judges each row; 0: none."""
        return np.array([route or 0 for route in self.routes], np.int64)[self.numbers]


@dataclass(frozen=True, eq=False)
class EncodedSet:
    """Tokenised rows of one data set, as flat arrays.

    Args:
        input_ids: [tokens] int32, all rows concatenated; this and the others may be memory maps.
        labels: [tokens] int32.
        offsets: [n + 1] int64; row i is ``offsets[i]:offsets[i + 1]``.
        row_ids: [n] int64.
        counts: what happened to the rows: ``rows`` read, ``cut_prompts``, ``cut_responses``, ``dropped``.
        fingerprint: sha256 of everything the tokens depend on (rows, tokenizer, template, limits).
        spans: [tokens] int32, as of ``Encoded``; None: there is one tokenizer.
        other: the same rows in the teachers' tokenizer; None: there is one tokenizer.
        tasks: the rows' tasks; None: not asked for, or rows have none.
        images: of the rows; None: no row has any.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    row_ids: NDArray[np.int64]
    counts: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    spans: NDArray[np.int32] | None = None
    other: EncodedSet | None = None
    tasks: RowTasks | None = None
    images: SetImages | None = None

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Encoded:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index = int(index) % len(self)
        part = slice(self.offsets[index], self.offsets[index + 1])
        return Encoded(
            self.input_ids[part].tolist(),
            self.labels[part].tolist(),
            int(self.row_ids[index]),
            None if self.tasks is None else self.tasks.route(index),
            None if self.spans is None else self.spans[part].tolist(),
            None if self.other is None else self.other[index],
            None if self.images is None else self.images.of(index),
        )

    def __iter__(self) -> Iterator[Encoded]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[n] tokens of each row, prompt included."""
        return np.diff(self.offsets)

    @cached_property
    def aligned_fraction(self) -> float | None:
        """Share of the valid tokens that lie in a span; None: there is one tokenizer, or nothing to align."""
        tokens = int(self.valid_tokens.sum())
        return None if self.spans is None or not tokens else float((self.spans >= 0).sum()) / tokens

    @cached_property
    def valid_tokens(self) -> NDArray[np.int64]:
        """[n] trained tokens of each row after the shift, which leaves nothing to predict position 0."""
        return count_valid(self.labels, self.offsets)


def count_valid(labels: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [n], the number of trained labels in each row, not counting position 0."""
    counts = np.zeros(len(offsets) - 1, np.int64)
    # A few rows at a time: running sums over all rows would be several times as large as the labels.
    for first in range(0, len(counts), _ROWS_AT_ONCE):
        bounds = offsets[first : first + _ROWS_AT_ONCE + 1]
        trained = labels[bounds[0] : bounds[-1]] != IGNORE_INDEX
        starts = bounds - bounds[0]
        trained[starts[:-1][np.diff(starts) > 0]] = False
        running = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
        counts[first : first + _ROWS_AT_ONCE] = running[starts[1:]] - running[starts[:-1]]
    return counts


def flatten(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return rows of ids as (flat [tokens] int32, offsets [n + 1] int64)."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    flat = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(offsets[-1]))
    return flat, offsets
