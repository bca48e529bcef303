"""Cuts a stream of examples into optimiser steps, by the rules of the samplers of indexed data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from deltakd.data.batches.budget import pack, starts_of
from deltakd.data.batches.sampler import WINDOW_STEPS
from deltakd.data.batches.stream import shuffled_steps
from deltakd.data.encoding.example_stream import Counts, Drawn, Example, Mark


class Taken(NamedTuple):
    """An example, and counts of the rows between its beginning and the next one's."""

    example: Example
    counts: Counts


#: The micro-batches of an optimiser step, over all ranks.
Step = list[list[Taken]]


@dataclass(frozen=True)
class Window:
    """Consecutive optimiser steps whose rows were drawn together, sorted by length and shuffled.

    Args:
        first_step: number of the first step.
        steps: the steps, in training order.
        begin: where its rows begin in the stream.
        end: where the next window's rows begin.
    """

    first_step: int
    steps: list[Step]
    begin: Mark
    end: Mark


class Pool:
    """Examples drawn from a stream that belong to no window yet."""

    def __init__(self, examples: Iterator[Drawn]) -> None:
        self._examples = examples
        self._drawn: list[Drawn] = []

    def __getitem__(self, index: int) -> Drawn:
        self.fill(index + 1)
        return self._drawn[index]

    def __len__(self) -> int:
        return len(self._drawn)

    def fill(self, count: int) -> None:
        """Draw until there are ``count`` examples."""
        while len(self._drawn) < count:
            self._drawn.append(next(self._examples))

    def lengths(self, count: int) -> NDArray[np.int64]:
        """Return [count], the numbers of tokens of the first examples."""
        self.fill(count)
        return np.array([len(drawn.example.input_ids) for drawn in self._drawn[:count]], dtype=np.int64)

    def take(self, count: int) -> list[Taken]:
        """Remove and return the first examples."""
        self.fill(count + 1)
        counts = [drawn.mark.counts for drawn in self._drawn[: count + 1]]
        taken, self._drawn = self._drawn[:count], self._drawn[count:]
        return [Taken(drawn.example, counts[n + 1].since(counts[n])) for n, drawn in enumerate(taken)]

    def rest_of_epoch(self, most: int) -> int | None:
        """Return how many examples are left in the first one's pass; None if more than ``most``.

        Draws as many examples as it needs, including one of the next pass if the answer is a number.
        """
        epoch = self[0].mark.epoch
        for index in range(most + 1):
            if self[index].mark.epoch > epoch:
                return index
        return None


class Windows(ABC):
    """Draws the steps of a run.

    As in the samplers, windows end with a pass: its last step is filled with the first examples of the next one.

    Args:
        accumulate: micro-batches of a rank in an optimiser step.
        world_size: number of ranks.
        seed: for the order of the steps in a window.
        most_steps: maximum steps per window.
    """

    def __init__(self, accumulate: int, world_size: int, seed: int, most_steps: int = WINDOW_STEPS) -> None:
        self.per_step = accumulate * world_size
        self.seed = seed
        self.most_steps = most_steps

    def draw(self, pool: Pool, first_step: int) -> Window:
        """Take the next window from the pool."""
        begin = pool[0].mark
        steps = self._steps(pool)
        order = shuffled_steps(self.seed, len(steps), first_step)
        return Window(first_step, [steps[number] for number in order], begin, pool[0].mark)

    @abstractmethod
    def _steps(self, pool: Pool) -> list[Step]:
        """Take a window's rows, and cut them into steps."""


@final
class RowWindows(Windows):
    """Steps with a fixed number of rows, as in ``StepSampler``.

    Args:
        batch_size: rows per rank and micro-batch.
        most_steps: 1 keeps the rows' order, apart from sorting by length within the step.
    """

    def __init__(self, batch_size: int, **options: int) -> None:
        super().__init__(**options)
        self.batch_size = batch_size

    def _steps(self, pool: Pool) -> list[Step]:
        size = self.batch_size * self.per_step
        left = pool.rest_of_epoch(self.most_steps * size)
        count = self.most_steps if left is None else min(-(-left // size), self.most_steps)
        rows = sorted(pool.take(count * size), key=lambda row: len(row.example.input_ids))
        micro = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return _grouped(micro, self.per_step)


@final
class BudgetWindows(Windows):
    """Steps of micro-batches filled up to a budget of positions, as in ``TokenBudgetSampler``.

    Args:
        max_tokens: maximum positions in a rank's micro-batch; at least the longest row's tokens.
    """

    def __init__(self, max_tokens: int, **options: int) -> None:
        super().__init__(**options)
        self.max_tokens = max_tokens

    def _steps(self, pool: Pool) -> list[Step]:
        target = self.most_steps * self.per_step
        rows = self._enough(pool, target, pool[0].mark.epoch)
        if self._needed(pool, rows) <= target:
            # The pass ends here: use as many steps as it needs, filled up with examples of the next one.
            target = -(-self._needed(pool, rows) // self.per_step) * self.per_step
            rows = self._enough(pool, target)
        rows = bisect_right(range(rows + 1), target, key=lambda count: self._needed(pool, count)) - 1
        taken = pool.take(rows)
        micro = [[taken[index] for index in part] for part in pack(_lengths(taken), self.max_tokens)]
        assert len(micro) == target, f"{len(micro)} micro-batches, not {target}"
        return _grouped(micro, self.per_step)

    def _enough(self, pool: Pool, micro_batches: int, epoch: int | None = None) -> int:
        """Return a number of examples that needs more micro-batches than these, or all that are left in the pass."""
        count = 0
        while self._needed(pool, count) <= micro_batches:
            # A quarter more each time, so that few examples beyond the window are drawn.
            for _ in range(max(count // 4, self.per_step)):
                if epoch is not None and pool[count].mark.epoch > epoch:
                    return count
                pool.fill(count + 1)
                count += 1
        return count

    def _needed(self, pool: Pool, count: int) -> int:
        """Return the number of micro-batches needed for the first examples of the pool."""
        return len(starts_of(np.sort(pool.lengths(count))[::-1], self.max_tokens))


def _lengths(rows: Sequence[Taken]) -> NDArray[np.int64]:
    return np.array([len(row.example.input_ids) for row in rows], dtype=np.int64)


def _grouped(micro: list[list[Taken]], per_step: int) -> list[Step]:
    return [micro[first : first + per_step] for first in range(0, len(micro), per_step)]
