"""A micro-batch as a trainer sends it: its tokens, which of them are real and trained on, and its images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltakd.data.batches.packed_rows import pack_rows
from deltakd.io.errors import ServerError
from deltakd.types import IGNORE_INDEX, Batch, TokenStream

#: Bytes of a request. A million positions of text take 6 MB, an image of a thousand tokens of Qwen2-VL 19 MB.
MOST_BYTES = 2**30
#: Before the names of the tensors of images, which are those of the models' arguments.
_IMAGES = "images."
#: Rows, images and patches of them have fewer.
_MOST_SIZE = 2**24


def request_of(batch: TokenStream) -> dict[str, Tensor]:
    """Return the tensors of a request: ``input_ids`` [B, T] int32, ``attention_mask`` and ``trained`` [B, T] bool.

    The labels are not sent: where a token is trained on, its label is the token. Images are sent as they are prepared.

    Raises:
        ServerError: they are more than a server takes.
    """
    found = {
        "input_ids": batch.input_ids.to(torch.int32),
        "attention_mask": batch.attention_mask.bool(),
        "trained": batch.labels != IGNORE_INDEX,
    }
    found |= {_IMAGES + name: tensor for name, tensor in (batch.images or {}).items()}
    size = sum(tensor.nbytes for tensor in found.values())
    if size > MOST_BYTES:
        raise ServerError(
            f"a micro-batch with its images has {size / 2**20:.0f} MiB, and a server of references takes "
            f"{MOST_BYTES / 2**20:.0f}; give a smaller data.batch_size, or smaller images"
        )
    return found


def images_of(request: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a request's tensors of images, by their names in it."""
    return {name: tensor for name, tensor in request.items() if name.startswith(_IMAGES)}


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
    images = {name.removeprefix(_IMAGES): tensor for name, tensor in images_of(tensors).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_IMAGES)}
    kinds = {"input_ids": torch.int32, "attention_mask": torch.bool, "trained": torch.bool}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if set(found) != set(kinds) or len({shape for _, shape in found.values()}) != 1:
        raise ValueError(f"a request has input_ids, attention_mask and trained of one shape; this one has {found}")
    rows, length = tensors["input_ids"].shape if tensors["input_ids"].dim() == 2 else (0, 0)
    if any(found[name][0] is not dtype for name, dtype in kinds.items()) or not rows or not length:
        raise ValueError(f"a request has tensors [B, T] of {kinds}; this one has {found}")
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
        images=_checked(images),
    )
    return pack_rows(batch) if packing else batch


def _checked(images: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors of images; None: there are none.

    Raises:
        ValueError: numbers in them would let a model make tensors of any size, or are none.
    """
    for name, tensor in images.items():
        if tensor.is_floating_point():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"the images' {name} is not finite")
        elif tensor.numel() and (int(tensor.min()) < 0 or int(tensor.max()) >= _MOST_SIZE):
            raise ValueError(f"the images' {name} holds {int(tensor.min())} to {int(tensor.max())}")
    grid, patches = images.get("image_grid_thw"), images.get("pixel_values")
    if grid is not None and (patches is None or grid.dim() != 2 or int(grid.prod(-1).sum()) != len(patches)):
        raise ValueError("the images' grids are not those of their patches")
    return images or None
