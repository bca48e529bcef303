"""Images as transformers' models take them: which tensors, which tokens they stand for, and the tokens' positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def image_inputs(model: Any, images: Mapping[str, Tensor], input_ids_BT: Tensor) -> dict[str, Tensor]:
    """Return the keyword arguments with which a model's body reads images.

    Args:
        model: a transformers image model.
        images: of the rows, as transformers' processor gives them.
        input_ids_BT: the rows.
    """
    accepted = inspect.signature(model.base_model.forward).parameters
    options = {name: tensor for name, tensor in images.items() if name in accepted}
    if "mm_token_type_ids" in accepted:
        options["mm_token_type_ids"] = _image_tokens(model.config, input_ids_BT)
    return options


def has_positions_of_axes(model: Any) -> bool:
    """Return True if a token has a position in time, height and width each, as in Qwen2-VL (M-RoPE)."""
    return hasattr(getattr(model, "base_model", None), "get_rope_index")


def positions_of_axes(
    model: Any, images: Mapping[str, Tensor] | None, input_ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor
) -> Tensor:
    """Return [3, B, T], the positions in time, height and width; those of text are equal.

    Text continues after an image at its largest position, so positions count fewer than tokens.

    Args:
        model: as for ``has_positions_of_axes``.
        images: of the rows; None: they are text.
        input_ids_BT: the rows.
        mask_BT: 1 on real tokens.
        positions_BT: of the tokens in rows that are text.
    """
    if images is None:
        return positions_BT.expand(3, -1, -1)
    positions_3BT, _ = model.base_model.get_rope_index(
        input_ids_BT,
        mm_token_type_ids=_image_tokens(model.config, input_ids_BT) * mask_BT,
        image_grid_thw=images["image_grid_thw"],
        attention_mask=mask_BT,
    )
    return positions_3BT


def _image_tokens(config: Any, input_ids_BT: Tensor) -> Tensor:
    """Return [B, T] int64, 1 on the tokens that stand for features of an image."""
    token = getattr(config, "image_token_id", None)
    return (input_ids_BT == (config.image_token_index if token is None else token)).to(torch.int64)
