"""Dropout that is switched off in the modules, whatever the architecture calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltakd.models import LoraSpec, ModelSpec, load_model
from deltakd.models.dropout import switch_off_dropout
from deltakd.models.lora import add_lora
from tests.tiny import save_model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {}),
        ("opt", {"dropout": 0.3, "attention_dropout": 0.2}),
        ("llama", {"attention_dropout": 0.3}),
        ("lora", {"attention_dropout": 0.3}),
    ],
)
def test_training_mode_then_gives_the_logits_of_evaluation(
    tmp_path: Path, family: str, options: dict[str, float]
) -> None:
    path = save_model(tmp_path / "m", seed=0, family="llama" if family == "lora" else family, **options)
    model = load_model("student", ModelSpec(str(path)), vocabulary=200)
    if family == "lora":
        model = add_lora(model, LoraSpec(dropout=0.2))
    ids = torch.arange(12).reshape(2, 6)
    model.train()
    with torch.no_grad():
        noisy = [model(ids).logits for _ in "ab"]
        rate = switch_off_dropout(model)
        quiet = [model(ids).logits for _ in "ab"]
        expected = model.eval()(ids).logits
    # A new adapter's product is 0, whatever its dropout.
    assert family == "lora" or not torch.equal(*noisy)
    assert torch.equal(*quiet)
    torch.testing.assert_close(quiet[0], expected)
    assert rate == pytest.approx({"gpt2": 0.1}.get(family, 0.3))
