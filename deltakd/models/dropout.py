"""Dropout: switched off where training must see the probabilities with which a student writes."""

from __future__ import annotations

from torch import nn

#: Parts of the names under which modules keep a rate as a plain number (``attention_dropout``, ``dropout``).
_NAMES = ("dropout", "pdrop")


def switch_off_dropout(model: nn.Module) -> float:
    """Set every rate of dropout to 0, without touching the config, and return the largest that was above 0.

    The model stays in training mode, which gradient checkpointing needs.
    """
    largest = 0.0
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            largest, module.p = max(largest, module.p), 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(part in name for part in _NAMES):
                largest = max(largest, value)
                setattr(module, name, 0.0)
    return largest
