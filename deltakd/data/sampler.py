"""Which rows each optimiser step trains on: a pure function of seed, rows of a step and rows of the data set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Rows of similar length are brought together within so many optimiser steps.
WINDOW_STEPS = 32


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one rank's micro-batch.

    Args:
        rows: [batch_size] int64 positions in the data set.
        step: the optimiser step, from 0.
        step_tokens: valid tokens of the whole step, over all ranks and micro-batches.
    """

    rows: NDArray[np.int64]
    step: int
    step_tokens: int


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
        for name, value in (("batch_size", batch_size), ("accumulate", accumulate), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{name} = {value}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank}; it must be from 0 to world_size - 1 = {world_size - 1}")
        if not len(self._lengths) or len(self._lengths) != len(self._valid):
            raise ValueError(
                f"{len(self._lengths)} lengths and {len(self._valid)} counts of valid tokens; there must be as many "
                f"of both, and at least one row"
            )
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.group_by_length = group_by_length
        self.rows_per_step = batch_size * accumulate * world_size
        self.total_steps = _total_steps(len(self._lengths), self.rows_per_step, epochs, max_steps)
        self._permutations: dict[int, NDArray[np.int64]] = {}
        self._window: tuple[int, NDArray[np.int64]] | None = None

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
            return self._by_length(self._stream(start, start + self.rows_per_step))
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
        stream = self._stream(first * self.rows_per_step, end * self.rows_per_step)
        steps = self._by_length(stream).reshape(end - first, self.rows_per_step)
        # The 1 keeps these draws apart from those of the permutations.
        order = np.random.Generator(np.random.PCG64([self.seed, first, 1])).permutation(end - first)
        return steps[order]

    def _by_length(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        # Stable, and the stream is in random order: so are rows of equal length.
        return rows[np.argsort(self._lengths[rows], kind="stable")]

    def _stream(self, start: int, stop: int) -> NDArray[np.int64]:
        """Rows ``start`` to ``stop`` of the endless stream of epochs."""
        epochs = range(start // self.rows, (stop - 1) // self.rows + 1)
        whole = np.concatenate([self._permutation(epoch) for epoch in epochs])
        skipped = epochs[0] * self.rows
        return whole[start - skipped : stop - skipped]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._permutations:
            if len(self._permutations) >= 4:
                self._permutations.clear()
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._permutations[epoch] = generator.permutation(self.rows).astype(np.int64)
        return self._permutations[epoch]


def _total_steps(rows: int, rows_per_step: int, epochs: float | None, max_steps: int | None) -> int:
    # Lightning writes "no limit" as -1.
    epochs = None if epochs == -1 else epochs
    max_steps = None if max_steps == -1 else max_steps
    for name, value in (("epochs", epochs), ("max_steps", max_steps)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} = {value}; it must be above 0, or null for no limit")
    if epochs is None:
        if max_steps is None:
            raise ValueError("neither epochs nor max_steps is given, so the run would never end; give one of them")
        return max_steps
    # 0.1 * 30 rows are 3.0000000000000004, and not a step more than 3.
    steps = math.ceil(epochs * rows / rows_per_step - 1e-9)
    return steps if max_steps is None else min(steps, max_steps)
