"""Which rows each optimiser step trains on: a pure function of seed, rows of a step and rows of the data set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deltakd.data.batches.stream import RowStream

#: Rows of similar length are brought together within so many optimiser steps.
WINDOW_STEPS = 32


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one rank's micro-batch.

    Args:
        rows: [B] int64 positions in the data set.
        step: the optimiser step, from 0.
        step_tokens: valid tokens of the whole step, over all ranks and micro-batches.
    """

    rows: NDArray[np.int64]
    step: int
    step_tokens: int


class Sampler(Protocol):
    """The order in which a rank sees the data: which rows make which micro-batch of which optimiser step.

    It is a pure function of its arguments: nothing is kept between calls but caches, so a run can go on at any step.
    Every step is made of ``accumulate`` micro-batches on each rank, and its rows do not depend on how its micro-batches
    are split over ranks and accumulation.
    """

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        ...

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps that one pass over the data takes."""
        ...

    @property
    def pass_ends(self) -> list[int]:
        """The steps (counted from 1) after which a pass over the data is done, in this run."""
        ...

    @property
    def borrowed_rows(self) -> int:
        """Rows of the next pass that the last step of the first pass takes; 0 where the run ends before."""
        ...

    def __len__(self) -> int:
        """Micro-batches of one rank in the whole run."""
        ...

    def epoch_of_step(self, step: int) -> int:
        """The epoch, from 0, in which the step (from 0) begins."""
        ...

    def rows_of_step(self, step: int) -> NDArray[np.int64]:
        """Positions of the step's rows in the data set, over all ranks; IndexError: no such step in this run."""
        ...

    def micro_batch(self, index: int) -> MicroBatch:
        """This rank's micro-batch ``index`` = step * accumulate + number within the step."""
        ...


@final
class StepSampler:
    """Fixes the rows of every optimiser step, then deals them out to micro-batches and ranks.

    Training is one continuous stream of rows: epoch after epoch, each a seeded permutation, cut into steps of
    G = batch_size * accumulate * world_size rows. A step that begins in one epoch and ends in the next takes its last
    rows from there, so all steps are full. With ``group_by_length`` the rows of up to WINDOW_STEPS steps of an epoch
    are sorted by length, cut into steps, and the order of the steps is shuffled. The rows of a step depend on G, not
    on how G is split. Nothing is kept between calls but caches, so any step can be asked for at any time.

    Args:
        lengths: [n] tokens of each row.
        valid_tokens: [n] trained tokens of each row.
        batch_size: rows per rank and micro-batch.
        accumulate: micro-batches of an optimiser step.
        world_size: number of ranks.
        rank: this rank, from 0.
        seed: of the permutations.
        epochs: passes over the data, a fraction is allowed; None: as many as ``max_steps`` needs.
        max_steps: most optimiser steps; None or -1: no limit.
        group_by_length: whether to sort within windows.

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
        """Micro-batches of one rank in the whole run."""
        return self.total_steps * self.accumulate

    @property
    def rows(self) -> int:
        """Rows of the data set."""
        return len(self._lengths)

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps that one pass over the data takes."""
        return self.rows / self.rows_per_step

    @property
    def pass_ends(self) -> list[int]:
        """The steps (counted from 1) after which a pass over the data is done, to the nearest step."""
        count = int(self.total_steps / self.steps_per_epoch)
        return [round(self.steps_per_epoch * (k + 1)) for k in range(count)]

    @property
    def borrowed_rows(self) -> int:
        """Rows of the next pass that the last step of the first pass takes; 0 where the run ends before."""
        ahead = -self.rows % self.rows_per_step
        return ahead if self.rows + ahead <= self.total_steps * self.rows_per_step else 0

    def epoch_of_step(self, step: int) -> int:
        """The epoch, from 0, in which the step begins."""
        return step * self.rows_per_step // self.rows

    def rows_of_step(self, step: int) -> NDArray[np.int64]:
        """[G] int64 positions of the step's rows in the data set, sorted by length if these are grouped.

        Raises:
            IndexError: no such step in this run.
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
        """This rank's micro-batch ``index`` = step * accumulate + number within the step.

        Ranks get neighbouring slices of the sorted rows, so that they wait little for each other.
        """
        step, number = divmod(index, self.accumulate)
        rows = self.rows_of_step(step)
        start = (number * self.world_size + self.rank) * self.batch_size
        return MicroBatch(rows[start : start + self.batch_size], step, int(self._valid[rows].sum()))

    def _window_of(self, step: int) -> tuple[int, int]:
        """First step and end of the step's window."""
        # Windows end with the epoch: else its last rows could come after the run's last step.
        epoch = self.epoch_of_step(step)
        epoch_first = -(-epoch * self.rows // self.rows_per_step)
        epoch_end = -(-(epoch + 1) * self.rows // self.rows_per_step)
        first = epoch_first + (step - epoch_first) // WINDOW_STEPS * WINDOW_STEPS
        return first, min(first + WINDOW_STEPS, epoch_end)

    def _make_window(self, first: int, end: int) -> NDArray[np.int64]:
        """[steps, G] rows of the steps of a window."""
        rows = self._stream[first * self.rows_per_step : end * self.rows_per_step]
        steps = self._by_length(rows).reshape(end - first, self.rows_per_step)
        return steps[self._stream.shuffled(end - first, first)]

    def _by_length(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        # Stable, and the stream is in random order: so are rows of equal length.
        return rows[np.argsort(self._lengths[rows], kind="stable")]


def check_split(accumulate: int, world_size: int, rank: int, **sizes: int) -> None:
    """Refuse numbers below 1, and a rank that there is not.

    Raises:
        ValueError: naming the number.
    """
    for name, value in {**sizes, "accumulate": accumulate, "world_size": world_size}.items():
        if value < 1:
            raise ValueError(f"{name} = {value}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank = {rank}; it must be from 0 to world_size - 1 = {world_size - 1}")


def check_rows(lengths: NDArray[np.int64], valid_tokens: NDArray[np.int64]) -> None:
    """Refuse an empty data set, and counts that don't belong together.

    Raises:
        ValueError: with both numbers of rows.
    """
    if not len(lengths) or len(lengths) != len(valid_tokens):
        raise ValueError(
            f"{len(lengths)} lengths and {len(valid_tokens)} counts of valid tokens; there must be as many "
            f"of both, and at least one row"
        )


def limits(epochs: float | None, max_steps: int | None) -> tuple[float | None, int | None]:
    """(epochs, max_steps) with None for "no limit", which Lightning writes as -1.

    Raises:
        ValueError: one is not above 0, or both are None.
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
    """Rounded up, but not for a rounding error: 0.1 * 30 rows are 3.0000000000000004, and not a step more than 3."""
    return math.ceil(number - 1e-9)


def _total_steps(rows: int, rows_per_step: int, epochs: float | None, max_steps: int | None) -> int:
    epochs, max_steps = limits(epochs, max_steps)
    if epochs is None:
        assert max_steps is not None
        return max_steps
    steps = ceil(epochs * rows / rows_per_step)
    return steps if max_steps is None else min(steps, max_steps)
