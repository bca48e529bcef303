"""Activations that transformers computes step by step, in one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fuse_activations(model: PreTrainedModel) -> PreTrainedModel:
    """Give GPT-2 and its kin PyTorch's tanh GELU, in place; return the model.

    It is the same function to rounding, in a third of the time, and the backward pass keeps one tensor instead of five.
    """
    from transformers.activations import NewGELUActivation  # loads the model classes with it

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model
