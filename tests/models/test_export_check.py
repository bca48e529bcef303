"""Exports that are the trained student, and those that are not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deltakd.models import ExportCheck, LanguageModel, LoraSpec, ModelSettings, ModelSpec, load_model, saving
from deltakd.models.lora import add_lora, merged
from deltakd.models.saving import save_student
from tests.tiny import make_tokenizer, save_model

#: Architecture -> the names of its embedding and of a layer inside.
TIED = {"gpt2": ("wte", "c_attn"), "qwen2": ("embed_tokens", "q_proj")}
ROWS = torch.randint(3, 280, (4, 12), generator=torch.Generator().manual_seed(0))


def student(path: Path, targets: Any = None, family: str = "gpt2", dtype: Any = "float32") -> LanguageModel:
    """A tied model whose adapter, if any, is far from nothing."""
    made = save_model(path, seed=1, family=family, tie_word_embeddings=True, initializer_range=0.2)
    model = LanguageModel(load_model("student", ModelSpec(str(made), dtype=dtype), vocabulary=280), 280)
    if targets is None:
        return model
    model = LanguageModel(add_lora(model.causal_lm, LoraSpec(r=4, target_modules=targets)), 280)
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3, generator=draw)
    return model.eval()


def perplexity(model: Any, ids_BT: Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=ids_BT).logits[:, :-1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten()).exp())


def check() -> ExportCheck:
    return ExportCheck([row.tolist() for row in ROWS], ModelSettings(), 280)


@pytest.mark.parametrize("where", ["head", "embedding", "both", "inside", "regex", "all-linear"])
@pytest.mark.parametrize("family", TIED)
def test_an_adapter_on_a_tied_head_or_embedding_exports_the_trained_student(
    family: str, where: str, tmp_path: Path
) -> None:
    embedding, inner = TIED[family]
    targets = {
        "head": ["lm_head"],
        "embedding": [embedding, inner],
        "both": ["lm_head", embedding],
        "inside": [inner],
        "regex": f".*({inner}|lm_head)",
        "all-linear": "all-linear",
    }[where]
    model = student(tmp_path / "in", targets, family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = perplexity(model.hf, ROWS)
    save_student(model, make_tokenizer(), tmp_path / "out", "# card", check())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert perplexity(exported, ROWS) == pytest.approx(trained, rel=1e-4)
    # The student may still be trained, and stays tied where the export is not.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    apart = where not in ("inside", "all-linear")
    assert AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings is not apart
    assert (exported.get_input_embeddings().weight is exported.get_output_embeddings().weight) is not apart


def test_the_adapter_of_a_quantised_student_is_merged_into_a_head_of_its_own(tmp_path: Path) -> None:
    """A stand-in that only says it is quantised, as in test_quantization.py."""
    model = student(tmp_path / "in", ["lm_head", "c_attn"])
    base: Any = model.causal_lm
    base.is_quantized = True
    assert perplexity(merged(model.hf), ROWS) == pytest.approx(perplexity(model.hf, ROWS), rel=1e-4)  # type: ignore[arg-type]


def test_an_architecture_that_can_not_untie_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = student(tmp_path / "in").causal_lm
    kind = type(model)
    original = kind.__init__

    def always_tied(self: Any, config: Any) -> None:
        original(self, config)
        self.lm_head.weight = self.transformer.wte.weight

    monkeypatch.setattr(kind, "__init__", always_tied)
    with pytest.raises(
        ValueError, match=r"target_modules=\['lm_head'\]: head and embedding of GPT2LMHeadModel are one"
    ):
        add_lora(model, LoraSpec(target_modules=["lm_head"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("targets", [None, ["lm_head", "c_attn"]])
def test_every_dtype_is_compared_in_its_own_precision(dtype: str, targets: Any, tmp_path: Path) -> None:
    model = student(tmp_path / "in", targets, dtype=dtype)
    save_student(model, make_tokenizer(), tmp_path / "out", "# card", check())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == getattr(torch, dtype)
    for parameter in exported.parameters():
        parameter.data.mul_(1.5)
    exported.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"its logits differ by up to \d.*the checkpoints are kept"):
        check().check(model.hf, make_tokenizer(), tmp_path / "out")


def test_a_student_that_was_cast_on_its_way_to_the_disk_is_compared_as_cast(tmp_path: Path) -> None:
    model = student(tmp_path / "in")
    save_student(student(tmp_path / "in", dtype="bfloat16"), make_tokenizer(), tmp_path / "out", "# card")
    check().check(model.hf, make_tokenizer(), tmp_path / "out")
    assert model.causal_lm.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_another_student_never_takes_the_place_of_the_former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging as it was: the adapter's part is added to the matrix that head and embedding share."""
    model = student(tmp_path / "in", ["lm_head"])
    monkeypatch.setattr(saving, "merged", lambda adapted: copy.deepcopy(adapted).merge_and_unload())
    with pytest.raises(ValueError, match="not the student that was trained: its logits differ by up to"):
        save_student(model, make_tokenizer(), tmp_path / "out", "# card", check())
    assert not [p for p in tmp_path.iterdir() if p.name != "in"]


def test_another_tokenizer_is_told(tmp_path: Path) -> None:
    model = student(tmp_path / "in")
    save_student(model, make_tokenizer(), tmp_path / "out", "# card", check())
    text = (tmp_path / "out" / "tokenizer.json").read_text()
    (tmp_path / "out" / "tokenizer.json").write_text(
        text.replace('"add_prefix_space":false', '"add_prefix_space":true').replace(
            '"add_prefix_space": false', '"add_prefix_space": true'
        )
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("red") != make_tokenizer().tokenize("red")
    with pytest.raises(
        ValueError, match=r"its tokenizer makes \[.*\] of a text of which the run's makes \[.*from token 0"
    ):
        check().check(model.hf, make_tokenizer(), tmp_path / "out")
