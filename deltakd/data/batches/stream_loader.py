"""One rank's micro-batches of a run over streamed data, prepared ahead in a thread and exactly resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

from deltakd.data.batches.ahead import Ahead
from deltakd.data.batches.loader import collate, saved_position
from deltakd.data.batches.windows import Pool, Step, Windows
from deltakd.data.encoding.example_stream import Counts, ExampleStream, Mark
from deltakd.types import Batch

#: Optimiser steps prepared ahead of training, tokenised and padded.
STEPS_AHEAD = 2


@dataclass(frozen=True)
class _MadeStep:
    """An optimiser step, ready for this rank.

    Args:
        number: of the step, from 0.
        batches: this rank's micro-batches.
        window: first step of its window, and where the window begins.
        counts: of the rows of all steps up to this one.
        is_last: True if it ends the requested passes, so no step follows.
    """

    number: int
    batches: list[Batch]
    window: tuple[int, Mark]
    counts: Counts
    is_last: bool


@final
class StreamLoader:
    """Tokenises the stream while the model trains, and hands out micro-batches.

    Every rank reads and tokenises the whole stream and keeps its part of each step. So the order, the number of valid
    tokens of a step and the state are the same on all ranks, for any number of ranks, without communication.

    The state is a position in the stream and a few counts; resuming draws the step's window again.

    ``iter`` starts at the loaded position (initially 0). Use one iterator at a time.

    Args:
        stream: the examples.
        windows: cuts them into steps.
        accumulate: micro-batches of this rank in an optimiser step.
        rank: this rank.
        world_size: number of ranks.
        pad_id, packing: as for ``collate``.
        total_steps: optimiser steps of the run, unless the passes end earlier.
        prepare: called with each batch, in the thread.
        epochs: maximum passes over the stream; None: as many as ``total_steps`` needs.
    """

    def __init__(
        self,
        stream: ExampleStream[Any, Any],
        windows: Windows,
        *,
        accumulate: int,
        rank: int,
        world_size: int,
        pad_id: int,
        total_steps: int,
        epochs: int | None,
        packing: bool = False,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        self.total_steps = total_steps
        self.counts = Counts()
        self._stream = stream
        self._windows = windows
        self._accumulate = accumulate
        self._rank = rank
        self._world_size = world_size
        self._pad_id = pad_id
        self._epochs = epochs
        self._packing = packing
        self._prepare = prepare
        self._position = 0
        self._window = (0, Mark())

    def __len__(self) -> int:
        """Return the number of micro-batches of one rank in the whole run; lower once the last step is known."""
        return self.total_steps * self._accumulate

    def __iter__(self) -> Iterator[Batch]:
        if self._position >= len(self):
            return
        start, number = divmod(self._position, self._accumulate)
        with Ahead(self._steps(start, *self._window), STEPS_AHEAD) as steps:
            for step in steps:
                if step.is_last:
                    # Set before its first batch is handed over, so that training knows by the end of the step.
                    self.total_steps = step.number + 1
                self._window, self.counts = step.window, step.counts
                for batch in step.batches[number:]:
                    # Set before the batch is handed over: a checkpoint saved while the caller holds it counts it as
                    # consumed.
                    self._position += 1
                    yield batch
                number = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the micro-batches handed over so far, and where the window of the last one begins."""
        first_step, mark = self._window
        return {
            "position": self._position,
            "total_steps": self.total_steps,
            "window": first_step,
            "mark": mark.numbers(),
            "counts": list(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the micro-batches handed over. Raises ValueError if the run is shorter."""
        self._position = saved_position(state, len(self))
        self.total_steps = min(self.total_steps, state["total_steps"])
        self._window = (state["window"], Mark.of(state["mark"]))
        self.counts = Counts(*state["counts"])

    def _steps(self, start: int, window_step: int, mark: Mark) -> Iterator[_MadeStep]:
        """Yield the steps from ``start``, which is in the given window or begins the next one."""
        pool = Pool(self._stream.examples(mark))
        step = window_step
        while step < self.total_steps:
            window = self._windows.draw(pool, step)
            over = self._epochs is not None and window.end.epoch >= self._epochs
            last = step + len(window.steps) - 1
            counts = window.begin.counts
            for micro_batches in window.steps:
                counts = counts.with_all(row.counts for rows in micro_batches for row in rows)
                if start <= step < self.total_steps:
                    batches, at = self._collate(micro_batches, step), (window.first_step, window.begin)
                    yield _MadeStep(step, batches, at, counts, over and step == last)
                step += 1
            if over:
                return

    def _collate(self, micro_batches: Step, step: int) -> list[Batch]:
        tokens = sum(row.example.valid_tokens for rows in micro_batches for row in rows)
        # Neighbouring micro-batches go to different ranks, as in the samplers.
        own = micro_batches[self._rank :: self._world_size]
        batches = (collate([row.example for row in rows], self._pad_id, step, tokens, self._packing) for rows in own)
        return [self._prepare(batch) for batch in batches]
