"""FSDP2 under autocast: what is gathered in half precision, and what is not."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from deltakd.distributed.sharding import is_sharded, shard_by_blocks
from tests.distributed.processes import on_ranks


def make_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, **sizes))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )


def gradients(model: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """Of one step under autocast on this rank's rows."""
    ids_BT = torch.arange(24).view(2, 12).add(5 * rank).remainder(32)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


def join() -> int:
    """Meet the other ranks; this rank's number."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    return rank


def compare(family: str) -> tuple[dict[str, torch.dtype], float]:
    """The dtypes in which parameters are seen, and the largest error beside the gradients' mean over the ranks."""
    rank = join()
    expected = gradients(make_model(family), rank)
    for gradient in expected.values():
        dist.all_reduce(gradient)
    model = make_model(family)
    shard_by_blocks(model, init_device_mesh("cpu", (2,)), autocast=torch.bfloat16)
    assert is_sharded(model)
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            module.register_forward_hook(
                lambda m, *_, at=f"{name}.{own}", own=own: seen.__setitem__(at, getattr(m, own).dtype)
            )
    found = gradients(model, rank)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    return seen, max(
        ((gradient - expected[name] / 2).abs().max() / expected[name].abs().max()).item()
        for name, gradient in found.items()
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_under_autocast_linear_layers_of_blocks_are_gathered_in_bfloat16_and_summed_in_float32(family: str) -> None:
    for seen, error in on_ranks(2, compare, family):
        half = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
        linear = (
            "c_attn",
            "c_proj",
            "c_fc",
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        )
        assert half == {name for name in seen if name.split(".")[-2] in linear}
        assert len(half) >= 14
        assert len(half) < len(seen)
        # Each rank's gradient is bfloat16 already; what is left is the order of the sums.
        assert error < 1e-5


class Odd(nn.Module):
    """A block whose experts are one tensor, beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.ones(2, 4, 4))
        self.down = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.down.weight.dtype
        return self.down(x @ self.experts[0])


class Odds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Odd(), Odd()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def dtypes_of_odds() -> set[torch.dtype]:
    join()
    model = Odds()
    shard_by_blocks(model, init_device_mesh("cpu", (1,)), autocast=torch.bfloat16)
    model(torch.ones(3, 4))
    return {block.seen for block in model.blocks}


def test_blocks_of_other_parts_are_gathered_as_they_are() -> None:
    assert on_ranks(1, dtypes_of_odds) == [{torch.float32}]
