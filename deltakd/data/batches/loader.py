"""Turns tokenised rows into batches of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltakd.data.batches.ahead import Ahead
from deltakd.data.batches.budget import check_budget, pack
from deltakd.data.batches.packed_rows import pack_rows
from deltakd.data.batches.sampler import Sampler
from deltakd.data.encoding.encoded_set import Encoded, EncodedSet
from deltakd.data.encoding.example_stream import Example
from deltakd.data.encoding.images import read_images
from deltakd.types import IGNORE_INDEX, UNALIGNED, AlignedStream, Alignment, Batch, TokenStream

#: Micro-batches made ahead of training.
BATCHES_AHEAD = 2


def collate(
    encoded: Sequence[Encoded | Example],
    pad_id: int,
    step: int,
    step_tokens: int,
    packing: bool = False,
    image_row: Encoded | None = None,
) -> Batch:
    """Pad rows on the right to the longest one.

    Only ``attention_mask`` = 0 and labels of IGNORE_INDEX mark padding, never the id, so ``pad_id`` may be EOS.

    Args:
        encoded: B rows.
        pad_id: any id of the vocabulary.
        step, step_tokens: copied into the batch.
        packing: also lay the rows end to end, for models to run them so.
        image_row: added to rows without images (``image_row_of``).
    """
    if image_row is not None and not any(isinstance(row, Encoded) and row.images for row in encoded):
        encoded = [*encoded, image_row]
    batch = Batch(
        *_padded(encoded, pad_id),
        row_ids=torch.tensor([row.row_id for row in encoded], dtype=torch.int64),
        step=step,
        step_tokens=step_tokens,
        other=_other(encoded),
        **_images(encoded),
    )
    routes = [row.route for row in encoded if row.route is not None]
    batch = batch.routed(routes) if routes else batch
    return pack_rows(batch) if packing else batch


def image_row_of(encoded: EncodedSet, world_size: int) -> Encoded | None:
    """Return a row with images, and without labels, for micro-batches of text alone; None: they need none.

    Several ranks must run the same parts of a model: those that are sharded, or whose gradients are averaged, wait for
    all ranks.
    """
    if world_size == 1 or encoded.images is None or not encoded.images.some_lack:
        return None
    shortest = min(encoded.images.examples, key=lambda index: int(encoded.lengths[index]))
    return _without_labels(encoded[shortest])


def _images(encoded: Sequence[Encoded | Example]) -> dict[str, Any]:
    """Return what a batch holds of the images of its rows, as keyword arguments."""
    of_rows = [row.images if isinstance(row, Encoded) else None for row in encoded]
    read = read_images(zip(of_rows, (row.input_ids for row in encoded), strict=True))
    if read is None:
        return {}
    return {"images": read, "image_digests": [b"" if images is None else images.digest for images in of_rows]}


def _padded(encoded: Sequence[Encoded | Example], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and labels, each [B, T]."""
    longest = max(len(row.input_ids) for row in encoded)
    input_ids = np.full((len(encoded), longest), pad_id, dtype=np.int64)
    labels = np.full((len(encoded), longest), IGNORE_INDEX, dtype=np.int64)
    mask = np.zeros((len(encoded), longest), dtype=np.int64)
    for number, row in enumerate(encoded):
        length = len(row.input_ids)
        input_ids[number, :length] = row.input_ids
        labels[number, :length] = row.labels
        mask[number, :length] = 1
    return torch.from_numpy(input_ids), torch.from_numpy(mask), torch.from_numpy(labels)


def _other(encoded: Sequence[Encoded | Example]) -> AlignedStream | None:
    """Return the rows in the teachers' tokenizer, and their alignment; None: there is one tokenizer."""
    others = [row.other for row in encoded if row.other is not None]
    if not others:
        return None
    # Any id of any vocabulary: under the mask its value does not count.
    stream = TokenStream(*_padded(others, 0))
    return AlignedStream(stream, Alignment.of(_spans(encoded), _spans(others)))


def _spans(rows: Sequence[Encoded | Example]) -> Tensor:
    """Return [N], the spans of the rows' valid tokens, numbered on from row to row."""
    found, count = [], 0
    for row in rows:
        spans = np.asarray(row.spans)[1:][np.asarray(row.labels)[1:] != IGNORE_INDEX]
        found.append(np.where(spans >= 0, spans + count, UNALIGNED))
        count += int(spans.max(initial=UNALIGNED)) + 1
    return torch.from_numpy(np.concatenate(found).astype(np.int64))


def saved_position(state: Mapping[str, Any], micro_batches: int) -> int:
    """Return the number of micro-batches after which a loader's state was saved.

    Raises:
        ValueError: this run has fewer.
    """
    position: int = state["position"]
    if not 0 <= position <= micro_batches:
        raise ValueError(
            f"the checkpoint was saved after {position} micro-batches, but this run has {micro_batches}; resume with "
            "the data, batch sizes and number of processes that it was started with"
        )
    return position


class StepLoader:
    """One rank's micro-batches of the whole run, made ahead in a thread and exactly resumable.

    ``iter`` starts at the loaded position (initially 0), however far an earlier iterator got. ``len`` is the run's
    total, even after resuming. Use one iterator at a time: the position is the latest iterator's.

    Args:
        encoded: the data.
        sampler: chooses the rows.
        pad_id, packing, image_row: as for ``collate``.
        prepare: called with each batch, in the thread.
        ahead: batches made before they are needed.
    """

    def __init__(
        self,
        encoded: EncodedSet,
        sampler: Sampler,
        pad_id: int,
        packing: bool = False,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
        ahead: int = BATCHES_AHEAD,
        image_row: Encoded | None = None,
    ) -> None:
        self.encoded = encoded
        self.image_row = image_row
        self.ahead = ahead
        self.sampler = sampler
        self.pad_id = pad_id
        self.packing = packing
        self.prepare = prepare
        self._start = 0
        self._position = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        with Ahead(map(self._make, range(self._start, len(self))), self.ahead) as batches:
            for index, batch in enumerate(batches, self._start):
                # Set before the batch is handed over: a checkpoint saved while the caller holds it counts it as
                # consumed. What the thread has made ahead does not count.
                self._position = index + 1
                yield batch

    def _make(self, index: int) -> Batch:
        micro = self.sampler.micro_batch(index)
        rows = [self.encoded[row] for row in micro.rows]
        made = collate(rows, self.pad_id, micro.step, micro.step_tokens, self.packing, self.image_row)
        return self.prepare(made)

    def state_dict(self) -> dict[str, int]:
        """Return ``position``, the number of micro-batches handed over so far."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after ``position`` micro-batches. Raises ValueError if the run is shorter."""
        self._start = self._position = saved_position(state, len(self))


class EvalLoader:
    """All rows once, sorted by length, in batches; every rank gets the same number of batches.

    Args:
        encoded: the data.
        batch_size: rows per batch; None: as many as fit in ``max_tokens``.
        pad_id: as for ``collate``.
        rank, world_size: batch i goes to rank i mod world_size. When the batches run out, a rank gets a batch whose
            labels are all masked: the ranks of a sharded model wait for each other, so all must run equally often.
        max_tokens: most positions per batch, padding included, if ``batch_size`` is None.
        packing: as for ``collate``.

    Raises:
        ValueError: a batch size below 1, or a row longer than ``max_tokens``.
    """

    def __init__(
        self,
        encoded: EncodedSet,
        batch_size: int | None,
        pad_id: int,
        rank: int = 0,
        world_size: int = 1,
        max_tokens: int | None = None,
        packing: bool = False,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"val_batch_size = {batch_size}; it must be at least 1")
        self.encoded = encoded
        self.pad_id = pad_id
        self.packing = packing
        self.rank = rank
        self.world_size = world_size
        self.image_row = image_row_of(encoded, world_size)
        if batch_size is not None:
            order = np.argsort(encoded.lengths, kind="stable")
            self._batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        else:
            assert max_tokens is not None, "neither batch_size nor max_tokens"
            check_budget(encoded.lengths, max_tokens, "validation")
            self._batches = pack(encoded.lengths, max_tokens)[::-1]

    def __len__(self) -> int:
        return -(-len(self._batches) // self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            index = number * self.world_size + self.rank
            if index < len(self._batches):
                rows = self._batches[index]
                tokens = int(self.encoded.valid_tokens[rows].sum())
                chosen = [self.encoded[row] for row in rows]
                yield collate(chosen, self.pad_id, number, tokens, self.packing, self.image_row)
            else:
                yield self._masked(number)

    def _masked(self, number: int) -> Batch:
        row = self.encoded[int(self._batches[0][0])]
        return collate([_without_labels(row)], self.pad_id, number, 0, self.packing, self.image_row)


def _without_labels(row: Encoded) -> Encoded:
    other = None if row.other is None else _without_labels(row.other)
    return replace(row, labels=[IGNORE_INDEX] * len(row.labels), other=other)
