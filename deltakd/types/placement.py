"""Where a model is, and in what precision: those of its first parameter."""

from __future__ import annotations

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter, to which its inputs belong.

    Raises:
        StopIteration: the model has no parameters.
    """
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first parameter.

    Raises:
        StopIteration: the model has no parameters.
    """
    return next(model.parameters()).dtype
