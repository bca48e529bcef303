"""A micro-batch as a trainer sends it: its tokens, and which of them are real and trained on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltakd.data.batches.packed_rows import pack_rows
from deltakd.types import IGNORE_INDEX, Batch


def request_of(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a request: ``input_ids`` [B, T] int32, ``attention_mask`` and ``trained`` [B, T] bool.

    The labels are not sent: where a token is trained on, its label is the token.
    """
    return {
        "input_ids": batch.input_ids.to(torch.int32),
        "attention_mask": batch.attention_mask.bool(),
        "trained": batch.labels != IGNORE_INDEX,
    }


def batch_of(tensors: Mapping[str, Tensor], packing: bool, vocabulary: int, longest: int | None) -> Batch:
    """Return the batch of a request, padded as the trainer's, so that the models compute the same numbers.

    Args:
        tensors: from the trainer.
        packing: lay the rows end to end, as the trainer does.
        vocabulary: V of the models.
        longest: positions of the models; None: no limit.

    Raises:
        ValueError: they are no request, or the models can't run them.
    """
    kinds = {"input_ids": torch.int32, "attention_mask": torch.bool, "trained": torch.bool}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if set(found) != set(kinds) or len({shape for _, shape in found.values()}) != 1:
        raise ValueError(f"a request has input_ids, attention_mask and trained of one shape, and this one {found}")
    rows, length = tensors["input_ids"].shape if tensors["input_ids"].dim() == 2 else (0, 0)
    if any(found[name][0] is not dtype for name, dtype in kinds.items()) or not rows or not length:
        raise ValueError(f"a request has tensors [B, T] of {kinds}, and this one {found}")
    ids, mask, trained = (tensors[name] for name in kinds)
    if bool((trained & ~mask).any()):
        raise ValueError("padding is trained on")
    if bool(((ids < 0) | (ids >= vocabulary))[mask].any()):
        raise ValueError(f"a token is outside of the {vocabulary} tokens that the models share")
    if longest is not None and length > longest:
        raise ValueError(f"a row has {length} tokens, and the models have positions for {longest}")
    input_ids = ids.to(torch.int64)
    batch = Batch(
        input_ids,
        mask.to(torch.int64),
        torch.where(trained, input_ids, IGNORE_INDEX),
        row_ids=torch.arange(rows),
        step=0,
        step_tokens=0,
    )
    return pack_rows(batch) if packing else batch
