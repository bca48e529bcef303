"""The data as a Lightning data module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning

from deltakd.data.batches.budget import TokenBudgetSampler
from deltakd.data.batches.loader import BATCHES_AHEAD, EvalLoader, StepLoader, image_row_of
from deltakd.data.batches.sampler import WINDOW_STEPS, Sampler, StepSampler, limits
from deltakd.data.batches.stream_loader import StreamLoader
from deltakd.data.batches.windows import BudgetWindows, RowWindows, Windows
from deltakd.data.encoding.encoded_set import EncodedSet
from deltakd.data.encoding.example_stream import ExampleStream
from deltakd.types import Batch


class DistillationData(lightning.LightningDataModule):
    """Hands out this rank's training stream.

    The whole run is one Lightning epoch: the sampler knows about passes over the data, Lightning does not. Use it with
    ``use_distributed_sampler=False``. The rank comes from the trainer once one is attached.

    Args:
        train: tokenised training rows.
        val: tokenised validation rows, if any.
        pad_id: the id to pad with.
        batch_size: rows per process and micro-batch; None: as many as fit in ``max_tokens``.
        accumulate: micro-batches per optimiser step.
        seed: for the order of the data.
        max_epochs: passes over the data, or None.
        max_steps: most optimiser steps, or None.
        val_batch_size: rows per process and validation batch; None: the same as ``batch_size``.
        group_by_length: group rows of similar length into steps; always on with ``max_tokens``.
        max_tokens: positions per process and micro-batch, padding included, if ``batch_size`` is None.
        world_size: number of processes; None: the trainer's, or 1 before a trainer is attached.
        stream: streamed training data instead of ``train``, which then holds a few of its rows.
        packing: lay the rows of a micro-batch end to end, so that models compute no padding.
    """

    def __init__(
        self,
        train: EncodedSet,
        val: EncodedSet | None,
        pad_id: int,
        batch_size: int | None,
        accumulate: int,
        seed: int,
        max_epochs: float | None,
        max_steps: int | None,
        val_batch_size: int | None = None,
        group_by_length: bool = True,
        max_tokens: int | None = None,
        world_size: int | None = None,
        stream: ExampleStream[Any, Any] | None = None,
        packing: bool = False,
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.max_epochs = max_epochs
        self.max_steps = max_steps
        self.val_batch_size = val_batch_size or batch_size
        self.group_by_length = group_by_length
        self.max_tokens = max_tokens
        self.world_size = world_size
        self.stream = stream
        self.packing = packing
        #: Further work on each training batch, done ahead in the loader's thread.
        self.prepare_batch: Callable[[Batch], Batch] | None = None
        #: Training batches made and prepared before they are needed.
        self.batches_ahead = BATCHES_AHEAD
        self._samplers: dict[tuple[int, int], Sampler] = {}

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run; for a stream, an upper limit: its passes may end earlier."""
        return self.sampler().total_steps if self.stream is None else self._most_steps(self.stream)

    @property
    def pass_ends(self) -> list[int]:
        """Steps of this run, counted from 1, that complete a pass over the data; none for a stream (unknown)."""
        return self.sampler().pass_ends if self.stream is None else []

    @property
    def borrowed_rows(self) -> int:
        """Rows of the next pass that the last step of the first pass takes, as far as known."""
        return self.sampler().borrowed_rows if self.stream is None else 0

    @property
    def step_size(self) -> int:
        """Rows per optimiser step over all ranks; maximum positions if batches are filled up to ``max_tokens``."""
        _, world_size = self._place()
        return (self.batch_size or self.max_tokens or 0) * self.accumulate * world_size

    def sampler(self) -> Sampler:
        place = self._place()
        if place not in self._samplers:
            self._samplers[place] = self._make_sampler(*place)
        return self._samplers[place]

    def _make_sampler(self, rank: int, world_size: int) -> Sampler:
        options: dict[str, Any] = {
            "accumulate": self.accumulate,
            "world_size": world_size,
            "rank": rank,
            "seed": self.seed,
            "epochs": self.max_epochs,
            "max_steps": self.max_steps,
        }
        lengths, valid_tokens = self.train.lengths, self.train.valid_tokens
        if self.batch_size is None:
            assert self.max_tokens is not None, "neither batch_size nor max_tokens"
            return TokenBudgetSampler(lengths, valid_tokens, max_tokens=self.max_tokens, **options)
        return StepSampler(
            lengths, valid_tokens, batch_size=self.batch_size, group_by_length=self.group_by_length, **options
        )

    def _most_steps(self, stream: ExampleStream[Any, Any]) -> int:
        """Return the steps from ``max_steps`` or the stream's token budget, whichever are fewer."""
        max_steps = None if self.max_steps == -1 else self.max_steps
        if stream.block_length is None or stream.max_tokens is None:
            assert max_steps is not None, "a stream of unknown length needs max_steps"
            return max_steps
        _, world_size = self._place()
        per_step = self._blocks(stream.block_length) * stream.block_length * self.accumulate * world_size
        steps = -(-stream.max_tokens // per_step)
        return steps if max_steps is None else min(steps, max_steps)

    def _blocks(self, length: int) -> int:
        """Return the number of blocks of text per micro-batch."""
        if self.batch_size is not None:
            return self.batch_size
        assert self.max_tokens is not None, "neither batch_size nor max_tokens"
        return self.max_tokens // length

    def _windows(self, stream: ExampleStream[Any, Any], world_size: int) -> Windows:
        options = {"accumulate": self.accumulate, "world_size": world_size, "seed": self.seed}
        if stream.block_length is not None:
            # All blocks have the same length: there is nothing to group.
            return RowWindows(self._blocks(stream.block_length), most_steps=1, **options)
        rows = (self.batch_size or max(1, (self.max_tokens or 0) // stream.max_length)) * self.accumulate * world_size
        # A window's rows stay in memory, as the buffer's do.
        options["most_steps"] = min(max(stream.passes.size // rows, 1), WINDOW_STEPS) if self.group_by_length else 1
        if self.batch_size is not None:
            return RowWindows(self.batch_size, **options)
        assert self.max_tokens is not None, "neither batch_size nor max_tokens"
        return BudgetWindows(self.max_tokens, **options)

    def train_dataloader(self) -> StepLoader | StreamLoader:
        """Return the micro-batches of the whole run."""
        rank, world_size = self._place()
        if self.stream is None:
            return StepLoader(
                self.train,
                self.sampler(),
                self.pad_id,
                self.packing,
                self._prepare,
                self.batches_ahead,
                image_row_of(self.train, world_size),
            )
        epochs, _ = limits(self.max_epochs, self.total_steps)
        return StreamLoader(
            self.stream,
            self._windows(self.stream, world_size),
            accumulate=self.accumulate,
            rank=rank,
            world_size=world_size,
            pad_id=self.pad_id,
            total_steps=self.total_steps,
            epochs=None if epochs is None else int(epochs),
            packing=self.packing,
            prepare=self._prepare,
        )

    def _prepare(self, batch: Batch) -> Batch:
        return batch if self.prepare_batch is None else self.prepare_batch(batch)

    def val_loader(self) -> EvalLoader | None:
        """Return this rank's validation batches, or None.

        Not Lightning's ``val_dataloader``: our own callback runs the validation.
        """
        if self.val is None:
            return None
        rank, world_size = self._place()
        return EvalLoader(self.val, self.val_batch_size, self.pad_id, rank, world_size, self.max_tokens, self.packing)

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, self.world_size or 1
        return self.trainer.global_rank, self.world_size or self.trainer.world_size
