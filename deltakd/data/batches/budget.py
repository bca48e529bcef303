"""Fills micro-batches with rows of similar length, up to a token budget."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deltakd.data.batches.sampler import WINDOW_STEPS, MicroBatch, ceil, check_rows, check_split, limits
from deltakd.data.batches.stream import RowStream


def check_budget(lengths: NDArray[np.int64], max_tokens: int, name: str = "training") -> None:
    """Check that every row fits the token budget.

    Args:
        lengths: [n] tokens of each row.
        max_tokens: the budget, in positions per micro-batch.
        name: of the set, for the message.

    Raises:
        ValueError: a row is too long; names the budget, the longest row and its length.
    """
    longest = int(lengths.max(initial=0))
    if longest > max_tokens:
        raise ValueError(
            f"data.max_tokens_per_batch is {max_tokens}, but {name} row {int(lengths.argmax())} has {longest} tokens; "
            f"give {longest} or more, or shorten rows with data.max_length={max_tokens}"
        )


def pack(lengths: NDArray[np.int64], max_tokens: int) -> list[NDArray[np.int64]]:
    """Pack rows into the fewest micro-batches such that rows × longest row stays within the budget.

    Greedy: the longest row, with as many of the next longest as fit, and so on. This is optimal (by an exchange
    argument), so more rows never need fewer micro-batches.

    Args:
        lengths: [n] tokens of each row, none above ``max_tokens``.
        max_tokens: the budget, in positions.

    Returns:
        For each micro-batch [B] int64 indices into ``lengths``, longest rows first; ties keep their order.
    """
    order = np.argsort(-lengths, kind="stable")
    return np.split(order, starts_of(lengths[order], max_tokens)[1:]) if len(order) else []


def starts_of(sorted_lengths: NDArray[np.int64], max_tokens: int) -> list[int]:
    """Return where the micro-batches begin among rows sorted from longest to shortest; see ``pack``."""
    starts, start, count = [], 0, len(sorted_lengths)
    while start < count:
        starts.append(start)
        start += max_tokens // int(sorted_lengths[start])
    return starts


class _Window(NamedTuple):
    """A stretch of the stream, sorted by length and cut into whole optimiser steps."""

    start: int
    rows: int
    first_step: int
    steps: int

    @property
    def stop(self) -> int:
        return self.start + self.rows

    @property
    def end_step(self) -> int:
        return self.first_step + self.steps


@final
class TokenBudgetSampler:
    """Fills every micro-batch with rows of similar length up to a budget of positions, padding included.

    Training is the same continuous stream of rows as StepSampler's, cut into windows. A window is the longest stretch
    that packs into exactly WINDOW_STEPS * M micro-batches, M = accumulate * world_size. The last window of an epoch has
    only as many steps as the rest of the epoch needs, and is filled up with the first rows of the next epoch. Within a
    window, M micro-batches of neighbouring lengths form a step, and the steps are shuffled. So every row comes once per
    epoch, all steps are full, and their rows depend on M, not on how M is split.

    Where a window begins depends on the windows before it. They are recomputed from the start of the run when needed,
    a few seconds for a million rows; nothing has to be saved.

    Args:
        lengths: [n] tokens of each row.
        valid_tokens: [n] trained tokens of each row.
        max_tokens: maximum positions in a rank's micro-batch: rows times longest row.
        accumulate: micro-batches per optimiser step.
        world_size: number of ranks.
        rank: this rank, from 0.
        seed: for the permutations.
        epochs: passes over the data; None: as many as ``max_steps`` needs. A fraction applies to the last epoch's
            steps.
        max_steps: maximum optimiser steps; None or -1: no limit.

    Raises:
        ValueError: a number below 1, no rows, a row longer than the budget, or neither epochs nor max_steps.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        valid_tokens: ArrayLike,
        *,
        max_tokens: int,
        accumulate: int,
        world_size: int,
        rank: int,
        seed: int,
        epochs: float | None,
        max_steps: int | None,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._valid = np.asarray(valid_tokens, dtype=np.int64)
        check_split(accumulate, world_size, rank, max_tokens=max_tokens)
        check_rows(self._lengths, self._valid)
        check_budget(self._lengths, max_tokens)
        self.max_tokens = max_tokens
        self.accumulate = accumulate
        self.world_size = world_size
        self.rank = rank
        self._rows = len(self._lengths)
        self._most_rows = max_tokens // max(1, int(self._lengths.min()))
        self._stream = RowStream(self._rows, seed)
        self._windows: list[_Window] = []
        self._made: tuple[int, list[list[NDArray[np.int64]]]] | None = None
        self._total_steps = self._count_steps(*limits(epochs, max_steps))

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return self._total_steps

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps in the first pass over the data; later passes pack slightly differently."""
        return float(self._steps_until(self._rows))

    @property
    def pass_ends(self) -> list[int]:
        """Steps of this run, counted from 1, that complete a pass over the data."""
        ends: list[int] = []
        epoch = 1
        while (end := self._steps_until(epoch * self._rows)) <= self.total_steps:
            ends.append(end)
            epoch += 1
        return ends

    @property
    def borrowed_rows(self) -> int:
        """Rows of the next pass that the last window of the first pass takes; 0 if the run ends earlier."""
        if self._steps_until(self._rows) > self.total_steps:
            return 0
        return next(window.stop for window in self._windows if window.stop >= self._rows) - self._rows

    def __len__(self) -> int:
        """Return the number of micro-batches of one rank in the whole run."""
        return self.total_steps * self.accumulate

    def epoch_of_step(self, step: int) -> int:
        """Return the epoch, from 0, in which the step's window begins."""
        return self._window_of(step).start // self._rows

    def rows_of_step(self, step: int) -> NDArray[np.int64]:
        """Return the positions of the step's rows in the data set, over all ranks, longest first.

        Raises:
            IndexError: there is no such step in this run.
        """
        return np.concatenate(self._micro_batches(step))

    def micro_batch(self, index: int) -> MicroBatch:
        """Return this rank's micro-batch ``index`` = step * accumulate + number within the step.

        Ranks get micro-batches of similar length, so they rarely wait for each other.
        """
        step, number = divmod(index, self.accumulate)
        micro_batches = self._micro_batches(step)
        tokens = sum(int(self._valid[rows].sum()) for rows in micro_batches)
        return MicroBatch(micro_batches[number * self.world_size + self.rank], step, tokens)

    @property
    def _per_step(self) -> int:
        return self.accumulate * self.world_size

    def _micro_batches(self, step: int) -> list[NDArray[np.int64]]:
        """Return the rows of each micro-batch of a step."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of a run of {self.total_steps}")
        window = self._window_of(step)
        if self._made is None or self._made[0] != window.first_step:
            self._made = (window.first_step, self._make(window))
        return self._made[1][step - window.first_step]

    def _make(self, window: _Window) -> list[list[NDArray[np.int64]]]:
        rows = self._stream[window.start : window.stop]
        packed = [rows[part] for part in pack(self._lengths[rows], self.max_tokens)]
        assert len(packed) == window.steps * self._per_step
        steps = [packed[first : first + self._per_step] for first in range(0, len(packed), self._per_step)]
        return [steps[number] for number in self._stream.shuffled(window.steps, window.first_step)]

    def _window_of(self, step: int) -> _Window:
        self._find_windows(lambda last: last.end_step > step)
        return self._windows[bisect_right(self._windows, step, key=lambda window: window.first_step) - 1]

    def _steps_until(self, place: int) -> int:
        """Return the number of steps after which all rows before a position in the stream have been trained on."""
        self._find_windows(lambda last: last.stop >= place)
        # The last window that begins before the position.
        return self._windows[bisect_right(self._windows, place - 1, key=lambda window: window.start) - 1].end_step

    def _count_steps(self, epochs: float | None, max_steps: int | None) -> int:
        if epochs is None:
            assert max_steps is not None
            return max_steps
        whole, fraction = divmod(epochs, 1)
        end = (int(whole) + (fraction > 0)) * self._rows
        self._find_windows(lambda last: last.stop >= end or (max_steps is not None and last.end_step >= max_steps))
        if max_steps is not None and self._windows[-1].stop < end:
            return max_steps
        before = self._steps_until(int(whole) * self._rows) if whole else 0
        steps = before + ceil(fraction * (self._steps_until(end) - before))
        return steps if max_steps is None else min(steps, max_steps)

    def _find_windows(self, enough: Callable[[_Window], bool]) -> None:
        """Add windows until ``enough`` is true of the last one."""
        while not (self._windows and enough(self._windows[-1])):
            last = self._windows[-1] if self._windows else _Window(0, 0, 0, 0)
            self._windows.append(self._next_window(last.stop, last.end_step))

    def _next_window(self, start: int, first_step: int) -> _Window:
        most = WINDOW_STEPS * self._per_step
        rest = self._rows - start % self._rows
        if rest <= most * self._most_rows and (needed := self._needed(start, rest)) <= most:
            steps = -(-needed // self._per_step)
            return _Window(start, self._fill(start, steps * self._per_step, rest), first_step, steps)
        return _Window(start, self._fill(start, most, most, rest), first_step, WINDOW_STEPS)

    def _fill(self, start: int, micro_batches: int, least: int, most: int | None = None) -> int:
        """Return the most rows from ``start``, between ``least`` and ``most``, that pack into ``micro_batches``."""
        most = micro_batches * self._most_rows if most is None else most
        candidates = range(least, most + 1)
        return candidates[bisect_right(candidates, micro_batches, key=lambda rows: self._needed(start, rows)) - 1]

    def _needed(self, start: int, rows: int) -> int:
        """Return the number of micro-batches that ``rows`` rows of the stream from ``start`` need."""
        lengths = np.sort(self._lengths[self._stream[start : start + rows]])[::-1]
        return len(starts_of(lengths, self.max_tokens))
