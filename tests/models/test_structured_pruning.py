"""Pruned models: what stays is the original's, they open in transformers, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deltakd.io.errors import ConfigError
from deltakd.models.structured_pruning import Cut, evenly, prune
from deltakd.prune import main, run_pruning
from tests.tiny import save_model

#: Family -> the options of a model with four heads, two of keys and values where it may have fewer.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"n_layer": 4, "n_head": 4},
}


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_model(tmp_path / "whole", seed=3, width=32, family=request.param, **FAMILIES[request.param])


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def silence(model: Any, layers: set[int]) -> None:
    """Let some layers write nothing, so that the model is what it is without them."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for number in layers:
        block = blocks[number]
        outs = [block.attn.c_proj, block.mlp.c_proj] if hasattr(block, "attn") else [
            block.self_attn.o_proj, block.mlp.down_proj]  # fmt: skip
        for out in outs:
            torch.nn.init.zeros_(out.weight)
            if out.bias is not None:
                torch.nn.init.zeros_(out.bias)


def test_without_layers_that_write_nothing_a_model_is_the_same(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    silence(model, {1, 2})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = prune(model, Cut(layers=[0, 3]))
    torch.testing.assert_close(logits(pruned.model), logits(model), rtol=1e-5, atol=1e-6)
    assert pruned.after < pruned.before
    assert pruned.changed == {"layers": (4, 2)}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_heads_and_channels_that_write_nothing_go_first(source: Path) -> None:
    """The others stay with their weights, in their order, so that the logits are the same."""
    model = AutoModelForCausalLM.from_pretrained(source)
    gpt2 = model.config.model_type == "gpt2"
    for number, block in enumerate(model.transformer.h if gpt2 else model.model.layers):
        attention, mlp = (
            (block.attn.c_proj, block.mlp.c_proj) if gpt2 else (block.self_attn.o_proj, block.mlp.down_proj)
        )
        width = attention.weight.shape[0 if gpt2 else 1]
        dead = slice(0, width // 2) if number % 2 else slice(width // 2, width)
        with torch.no_grad():
            rows, channels = (attention.weight, mlp.weight) if gpt2 else (attention.weight.T, mlp.weight.T)
            rows[dead] = 0
            channels[3::4] = 0
    channels_left = (128 if gpt2 else 64) * 3 // 4
    cut = Cut(intermediate=channels_left) if gpt2 else Cut(intermediate=channels_left, heads=2)
    pruned = prune(model, cut)
    torch.testing.assert_close(logits(pruned.model), logits(model), rtol=1e-4, atol=1e-6)


def test_a_narrower_model_opens_in_transformers_with_its_tokenizer_and_card(source: Path, tmp_path: Path) -> None:
    gpt2 = AutoConfig.from_pretrained(source).model_type == "gpt2"
    output = tmp_path / "small"
    run_pruning([f"model={source}", f"output={output}", "layers=0,2-3", "intermediate=40", "heads=2", "hidden=16"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 16, 2)
    assert (config.n_inner if gpt2 else config.intermediate_size) == 40
    assert logits(model).isfinite().all()
    ids = model.generate(**tokenizer("red", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert ids.shape[1] > 1
    original = AutoTokenizer.from_pretrained(source)
    assert tokenizer("red cat")["input_ids"] == original("red cat")["input_ids"]
    assert (output / "generation_config.json").is_file()
    card = (output / "README.md").read_text()
    assert "| layers | 0, 2, 3 |" in card
    assert "| heads | 2 |" in card
    parameters = sum(p.numel() for p in model.parameters())
    assert f"→ {parameters:,} parameters" in card


def test_layers_at_even_distances_have_both_ends() -> None:
    assert evenly(30, 4) == [0, 10, 19, 29]
    assert (evenly(5, 5), evenly(3, 1)) == ([0, 1, 2, 3, 4], [0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers=0,9"], r"layers 9: the model has 4; give numbers from 0 to 3"),
        (["layers=2,0"], r"layers 2,0 are not in the model's order; give 0,2"),
        (["layers=1,1"], "layers 1 are given twice"),
        (["layers=0-x"], r"'0-x' is neither a number nor a range; write layers=0,2,5-9"),
        (["keep=9"], "keep=9: the model has 4 layers; give 1 to 4"),
        (["heads=3"], r"2 query heads share each of the 2 heads of keys and values.*the nearest are 2 and 4"),
        (["hidden=999", "intermediate=999"], r"(?s)intermediate=999: the model has 64.*hidden=999: the model has 32"),
        (["layers=0-3"], "nothing is cut"),
        (["keep=2", "layers=0"], "keep and layers are both given; give one of them"),
        (["widht=3"], r"'widht=3' is not understood.*allowed: model=\.\.\."),
        ([], "nothing to cut is given"),
        (["keep=0"], "keep=0: give a whole number of 1 or more"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    source = save_model(tmp_path / "whole", seed=3, width=32, family="llama", **FAMILIES["llama"])
    with pytest.raises(ConfigError, match=message):
        run_pruning([f"model={source}", f"output={tmp_path / 'small'}", *arguments])
    assert not (tmp_path / "small").exists()


def test_other_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opt = save_model(tmp_path / "opt", seed=1, family="opt")
    gpt2 = save_model(tmp_path / "gpt2", seed=1, width=32, n_head=4)
    for given, message in (
        ([f"model={opt}", f"output={tmp_path / 'x'}", "keep=1"], "models of the type 'opt' can't be pruned"),
        ([f"model={gpt2}", f"output={tmp_path / 'x'}", "heads=2"], "both change together: heads=2 hidden=16"),
        ([f"model={gpt2}", f"output={gpt2}", "keep=1"], "holds a model already; give another directory"),
        ([f"model={tmp_path / 'none'}", f"output={tmp_path / 'x'}", "keep=1"], "none: "),
    ):
        with pytest.raises(SystemExit):
            main(given)
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
