from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models import LanguageModel, LoraSpec, ModelSpec, load_model
from deltakd.models.lora import add_lora, merged
from deltakd.models.quantization import quantization_problems, student_problems, weight_bits
from tests.tiny import World, save_model

EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
AS_OVERRIDE = "{quant_method: bitsandbytes, load_in_8bit: true}"
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("8bit", r"is '8bit'; give a mapping: key=\{quant_method"),
        ({"load_in_8bit": True}, "key.quant_method is None; allowed: .*bitsandbytes, "),
        ({"quant_method": "bytesandbits"}, "key.quant_method is 'bytesandbits'; allowed: .*, bitsandbytes, .*torchao"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes needs load_in_8bit: true or load_in_4bit: true"),
    ],
)
def test_what_is_wrong_with_a_config(settings: Any, message: str) -> None:
    (problem,) = quantization_problems("key", settings)
    assert re.search(message, problem), problem


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_a_package_that_is_absent_is_named(train: Callable[..., RunDirectory]) -> None:
    with pytest.raises(ConfigError, match=r"model.teacher.quantization: .*pip install -U bitsandbytes"):
        train("kd", f"model.teacher.quantization={AS_OVERRIDE}")


def test_a_quantised_student_needs_an_adapter(train: Callable[..., RunDirectory]) -> None:
    with pytest.raises(ConfigError, match=r"quantised weights can't be trained; add an adapter with model/lora"):
        train("sft", f"model.student.quantization={AS_OVERRIDE}")
    assert student_problems(EIGHT, has_adapter=True) == student_problems(None, has_adapter=False) == []
    if not torch.cuda.is_available():
        assert "no gradients through 4-bit weights" in student_problems({"load_in_4bit": True}, has_adapter=True)[0]


def test_the_config_arrives_at_transformers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    original = AutoModelForCausalLM.from_pretrained

    def spy(*arguments: Any, quantization_config: Any, **options: Any) -> Any:
        given["config"], given["dtype"] = quantization_config, options["dtype"]
        return original(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    spec = ModelSpec(path=str(world.root / "teacher"), dtype="bfloat16", quantization=EIGHT)
    load_model("teacher", spec, vocabulary=100)
    assert given["config"].load_in_8bit
    assert given["config"].quant_method == "bitsandbytes"
    assert given["dtype"] == torch.bfloat16


def test_bits() -> None:
    assert weight_bits(EIGHT) == 8
    assert weight_bits({"quant_method": "bitsandbytes", "load_in_4bit": True}) == 4
    assert weight_bits({"quant_method": "gptq", "bits": 3}) == 3
    assert weight_bits({"quant_method": "torchao", "quant_type": "int4_weight_only"}) == 4
    assert weight_bits(None) is None


def test_a_quantised_head_is_refused(world: World) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.root / "teacher")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(10, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"output embedding of GPT2LMHeadModel is quantised .*llm_int8_skip_modules"):
        LanguageModel(model, 10)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_adapter_is_merged_into_the_weights_as_they_were(tmp_path: Path, family: str) -> None:
    """A stand-in that only says it is quantised: the weights read again are its own, so both ways must agree."""
    base = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "base", seed=1, family=family))
    adapted = add_lora(base, LoraSpec(r=2))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    plain = merged(adapted)
    base.is_quantized = True
    reread = merged(adapted)
    ids = torch.arange(2, 9)[None]
    adapted.eval()
    for model in (plain, reread):
        torch.testing.assert_close(model.eval()(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert not getattr(reread, "is_quantized", False)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_eight_bits_train_to_close_losses(train: Callable[..., RunDirectory], tmp_path: Path) -> None:
    path = f"model.teacher.path={save_model(tmp_path / 'teacher', seed=3, width=64)}"
    quantized = f"model.teacher.quantization={AS_OVERRIDE}"
    values = [train("kd", path, *extra, name=str(len(extra))).read_summary() for extra in ((), (quantized,))]
    assert values[1]["val/loss"] == pytest.approx(values[0]["val/loss"], rel=1e-3)
    student = ("model/lora=default", f"model.student.path={tmp_path / 'teacher'}")
    eight = ("model.student.dtype=bfloat16", f"model.student.quantization={AS_OVERRIDE}")
    runs = [train("sft", *student, *extra, name=f"lora{len(extra)}") for extra in ((), eight)]
    values = [run.read_summary() for run in runs]
    assert values[1]["val/loss"] == pytest.approx(values[0]["val/loss"], rel=5e-3)
    assert AutoModelForCausalLM.from_pretrained(runs[1].student).config.to_dict().get("quantization_config") is None
