"""Chooses the rows of each optimiser step: a pure function of the seed, the rows per step and the data set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deltakd.data.batches.stream import RowStream

#: Rows are grouped by length within windows of this many optimiser steps.
WINDOW_STEPS = 32


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one rank's micro-batch.

    Args:
        rows: [B] int64 positions in the data set.
        step: the optimiser step, from 0.
        step_tokens: valid tokens in the whole step, over all ranks and micro-batches.
    """

    rows: NDArray[np.int64]
    step: int
    step_tokens: int


class Sampler(Protocol):
    """The order in which a rank sees the data: the rows of each micro-batch of each optimiser step.

    A pure function of its arguments: only caches are kept between calls, so a run can resume at any step. Every step
    has ``accumulate`` micro-batches on each rank. Its rows do not depend on how its micro-batches are split over ranks
    and accumulation.
    """

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        ...

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps in one pass over the data."""
        ...

    @property
    def pass_ends(self) -> list[int]:
        """Steps of this run, counted from 1, that complete a pass over the data."""
        ...

    @property
    def borrowed_rows(self) -> int:
        """Rows of the next pass that the last step of the first pass takes; 0 where the run ends before."""
        ...

    def __len__(self) -> int:
        """Return the number of micro-batches of one rank in the whole run."""
        ...

    def epoch_of_step(self, step: int) -> int:
        """Return the epoch, from 0, in which the step (from 0) begins."""
        ...

    def rows_of_step(self, step: int) -> NDArray[np.int64]:
        """Return the positions of the step's rows in the data set, over all ranks. IndexError: no such step."""
        ...

    def micro_batch(self, index: int) -> MicroBatch:
        """Return this rank's micro-batch ``index`` = step * accumulate + number within the step."""
        ...


@final
class StepSampler:
    """Fixes the rows of every optimiser step, then deals them out to micro-batches and ranks.

    Training is one continuous stream of rows: epoch after epoch, each a seeded permutation, cut into steps of
    G = batch_size * accumulate * world_size rows. A step that starts in one epoch may end in the next, so all steps
    are full. With ``group_by_length``, the rows of up to WINDOW_STEPS steps of an epoch are sorted by length and cut
    into steps, and the steps are shuffled. The rows of a step depend on G, not on how G is split. Only caches are kept
    between calls, so steps can be requested in any order.

    Args:
        lengths: [n] tokens of each row.
        valid_tokens: [n] trained tokens of each row.
        batch_size: rows per rank and micro-batch.
        accumulate: micro-batches per optimiser step.
        world_size: number of ranks.
        rank: this rank, from 0.
        seed: for the permutations.
        epochs: passes over the data, may be fractional; None: as many as ``max_steps`` needs.
        max_steps: most optimiser steps; None or -1: no limit.
        group_by_length: sort rows by length within windows.

    Raises:
        ValueError: a number below 1, no rows, or neither epochs nor max_steps.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        valid_tokens: ArrayLike,
        *,
        batch_size: int,
        accumulate: int,
        world_size: int,
        rank: int,
        seed: int,
        epochs: float | None,
        max_steps: int | None,
        group_by_length: bool = True,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._valid = np.asarray(valid_tokens, dtype=np.int64)
        check_split(accumulate, world_size, rank, batch_size=batch_size)
        check_rows(self._lengths, self._valid)
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.group_by_length = group_by_length
        self.rows_per_step = batch_size * accumulate * world_size
        self._total_steps = _total_steps(len(self._lengths), self.rows_per_step, epochs, max_steps)
        self._stream = RowStream(len(self._lengths), seed)
        self._window: tuple[int, NDArray[np.int64]] | None = None

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return self._total_steps

    def __len__(self) -> int:
        """Return the number of micro-batches of one rank in the whole run."""
        return self.total_steps * self.accumulate

    @property
    def rows(self) -> int:
        """Rows of the data set."""
        return len(self._lengths)

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps in one pass over the data."""
        return self.rows / self.rows_per_step

    @property
    def pass_ends(self) -> list[int]:
        """Steps, counted from 1, that complete a pass over the data, to the nearest step."""
        count = int(self.total_steps / self.steps_per_epoch)
        return [round(self.steps_per_epoch * (k + 1)) for k in range(count)]

    @property
    def borrowed_rows(self) -> int:
        """Rows of the next pass that the last step of the first pass takes; 0 where the run ends before."""
        ahead = -self.rows % self.rows_per_step
        return ahead if self.rows + ahead <= self.total_steps * self.rows_per_step else 0

    def epoch_of_step(self, step: int) -> int:
        """Return the epoch, from 0, in which the step begins."""
        return step * self.rows_per_step // self.rows

    def rows_of_step(self, step: int) -> NDArray[np.int64]:
        """Return the [G] int64 positions of the step's rows in the data set, shortest first.

        Raises:
            IndexError: there is no such step in this run.
        """
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of a run of {self.total_steps}")
        if not self.group_by_length:
            start = step * self.rows_per_step
            return self._by_length(self._stream[start : start + self.rows_per_step])
        first, last = self._window_of(step)
        if self._window is None or self._window[0] != first:
            self._window = (first, self._make_window(first, last))
        return self._window[1][step - first]

    def micro_batch(self, index: int) -> MicroBatch:
        """Return this rank's micro-batch ``index`` = step * accumulate + number within the step.

        Ranks get neighbouring slices of the sorted rows, so they rarely wait for each other.
        """
        step, number = divmod(index, self.accumulate)
        rows = self.rows_of_step(step)
        start = (number * self.world_size + self.rank) * self.batch_size
        return MicroBatch(rows[start : start + self.batch_size], step, int(self._valid[rows].sum()))

    def _window_of(self, step: int) -> tuple[int, int]:
        """Return the first step of the step's window, and the step after its last."""
        # Windows end with the epoch; otherwise the epoch's last rows could come after the run's last step.
        epoch = self.epoch_of_step(step)
        epoch_first = -(-epoch * self.rows // self.rows_per_step)
        epoch_end = -(-(epoch + 1) * self.rows // self.rows_per_step)
        first = epoch_first + (step - epoch_first) // WINDOW_STEPS * WINDOW_STEPS
        return first, min(first + WINDOW_STEPS, epoch_end)

    def _make_window(self, first: int, end: int) -> NDArray[np.int64]:
        """Return [steps, G], the rows of a window's steps."""
        rows = self._stream[first * self.rows_per_step : end * self.rows_per_step]
        steps = self._by_length(rows).reshape(end - first, self.rows_per_step)
        return steps[self._stream.shuffled(end - first, first)]

    def _by_length(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        # The sort is stable and the stream random, so rows of equal length stay in random order.
        return rows[np.argsort(self._lengths[rows], kind="stable")]


def check_split(accumulate: int, world_size: int, rank: int, **sizes: int) -> None:
    """Raise a ValueError that names a number below 1, or a rank outside ``world_size``."""
    for name, value in {**sizes, "accumulate": accumulate, "world_size": world_size}.items():
        if value < 1:
            raise ValueError(f"{name} = {value}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank = {rank}; it must be from 0 to world_size - 1 = {world_size - 1}")


def check_rows(lengths: NDArray[np.int64], valid_tokens: NDArray[np.int64]) -> None:
    """Raise a ValueError for an empty data set, or if the two arrays differ in length."""
    if not len(lengths) or len(lengths) != len(valid_tokens):
        raise ValueError(
            f"{len(lengths)} lengths and {len(valid_tokens)} counts of valid tokens; there must be as many "
            f"of both, and at least one row"
        )


def limits(epochs: float | None, max_steps: int | None) -> tuple[float | None, int | None]:
    """Return (epochs, max_steps) with None for "no limit", which Lightning writes as -1.

    Raises:
        ValueError: either is not above 0, or neither is a limit.
    """
    epochs = None if epochs == -1 else epochs
    max_steps = None if max_steps == -1 else max_steps
    for name, value in (("epochs", epochs), ("max_steps", max_steps)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} = {value}; it must be above 0, or null for no limit")
    if epochs is None and max_steps is None:
        raise ValueError("neither epochs nor max_steps is given, so the run would never end; give one of them")
    return epochs, max_steps


def ceil(number: float) -> int:
    """Round up, ignoring floating-point error: 0.07 * 100 is 7.000000000000001, which must give 7, not 8."""
    return math.ceil(number - 1e-9)


def _total_steps(rows: int, rows_per_step: int, epochs: float | None, max_steps: int | None) -> int:
    epochs, max_steps = limits(epochs, max_steps)
    if epochs is None:
        assert max_steps is not None
        return max_steps
    steps = ceil(epochs * rows / rows_per_step)
    return steps if max_steps is None else min(steps, max_steps)
