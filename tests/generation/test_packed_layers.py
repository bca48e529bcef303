"""Repacked weights give the plain products, and nothing of them stays in the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltakd.generation import packed_layers as module
from deltakd.generation.packed_layers import packed_layers

if not module._serves():
    pytest.skip("oneDNN repacks no weights on this machine", allow_module_level=True)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    monkeypatch.setattr(module, "SMALLEST", 64)
    torch.manual_seed(0)
    half = nn.Linear(16, 16, dtype=torch.bfloat16)
    return nn.Sequential(nn.Linear(16, 33), nn.Linear(33, 16, bias=False), nn.Linear(16, 2), half)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_products_are_those_of_plain_layers_and_repeat(model: nn.Sequential, rows: int) -> None:
    hidden = torch.randn(rows, 1, 16)
    expected = model[:3](hidden)
    with packed_layers(model, 8):
        found = model[:3](hidden)
        assert torch.equal(found, model[:3](hidden))
    torch.testing.assert_close(found, expected)
    assert torch.equal(model[:3](hidden), expected)


def test_large_float32_layers_that_nobody_replaced_are_repacked_while_memory_lasts(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced() -> list[bool]:
        with packed_layers(model, 8):
            return ["forward" in vars(layer) for layer in model]

    assert replaced() == [True, True, False, False]
    monkeypatch.setattr(module, "MOST_BYTES", model[0].weight.nbytes)
    assert replaced() == [True, False, False, False]
    model[0].forward = lambda hidden: hidden
    assert replaced() == [True, True, False, False]
    assert model[0](3) == 3


@torch.no_grad()
def test_autocast_multiplies_in_its_own_precision(model: nn.Sequential) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model[0](torch.ones(2, 16))
        with packed_layers(model, 2):
            found = model[0](torch.ones(2, 16))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_an_error_restores_the_layers(model: nn.Sequential) -> None:
    with pytest.raises(KeyError), packed_layers(model, 8):
        raise KeyError
    assert not any("forward" in vars(layer) for layer in model)
