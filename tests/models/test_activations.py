"""A fused activation is the same function, and nothing of it shows in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from deltakd.models.activations import fuse_activations


def test_gpt2_computes_the_same_with_one_kernel() -> None:
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8)).eval()
    ids, names = torch.arange(6)[None], set(model.state_dict())
    expected = model(input_ids=ids).logits
    assert fuse_activations(model) is model
    assert any(type(module) is nn.GELU for module in model.modules())
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert set(model.state_dict()) == names
    assert model.config.activation_function == "gelu_new"
