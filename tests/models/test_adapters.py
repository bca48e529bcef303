"""A tuned teacher that is an adapter on its raw teacher: one set of weights for both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from deltakd.evaluation.subject import of_pair
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models import LanguageModel, ModelSettings, ModelSpec
from deltakd.models.adapter_files import BASE_FILE, adapter_problems, shared_weights, with_base
from deltakd.models.roles import open_model
from deltakd.references import LiveReferences
from deltakd.types import IGNORE_INDEX, Batch
from tests.tiny import World, save_model

V = 300
Train = Callable[..., RunDirectory]


def save_adapter_on(base: Path, directory: Path, seed: int, **options: Any) -> Path:
    """Write an adapter whose two matrices are random, so that it changes the logits much."""
    torch.manual_seed(seed)
    given = {"r": 4, "target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True} | options
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**given))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(directory)
    return directory


def merged(base: Path, adapter: Path, directory: Path) -> Path:
    """Write the tuned teacher as a model of its own, by peft alone."""
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().save_pretrained(
        directory
    )
    return directory


def open_alone(role: str, path: Path) -> LanguageModel:
    return open_model(role, ModelSpec(str(path)), ModelSettings(), vocabulary=V).eval()


def make_batch() -> Batch:
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = IGNORE_INDEX
    return Batch(ids, torch.ones_like(ids), labels, torch.arange(2), 0, 10)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "raw", seed=2, vocab_size=V)


def test_two_teachers_and_their_raw_teacher_share_one_set_of_weights(base: Path, tmp_path: Path) -> None:
    adapters = {role: save_adapter_on(base, tmp_path / role, n) for n, role in enumerate(("teacher", "teacher_2"))}
    specs = {role: ModelSpec(str(base), adapter=str(path)) for role, path in adapters.items()}
    specs["teacher_raw"] = ModelSpec(str(base))
    teacher = specs.pop("teacher")
    model = open_model("teacher", teacher, ModelSettings(), vocabulary=V, sharing=specs)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    references = LiveReferences(dict.fromkeys(("teacher", "teacher_2", "teacher_raw"), model))
    heads = references(make_batch())
    assert len(runs) == 3
    expected = {role: open_alone(role, merged(base, path, tmp_path / f"{role}_m")) for role, path in adapters.items()}
    expected["teacher_raw"] = open_alone("teacher_raw", base)
    for role, alone in expected.items():
        wanted = alone(make_batch()).logits()
        torch.testing.assert_close(heads[role].logits(), wanted, atol=2e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(heads["teacher_raw"].hidden, expected["teacher_raw"](make_batch()).hidden)
    # The order of roles leaves nothing behind: a second call gives the same bits.
    again = references(make_batch())
    assert all(torch.equal(again[role].hidden, heads[role].hidden) for role in heads)
    # Measures call the teacher of the pair that judges a row `teacher`.
    judges = LiveReferences(of_pair({"teacher": model, "teacher_2": model}, 2))(make_batch())
    assert judges.keys() == {"teacher"}
    assert torch.equal(judges["teacher"].hidden, heads["teacher_2"].hidden)


def test_roles_with_the_same_model_run_once(base: Path) -> None:
    model = open_alone("teacher_raw", base)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    heads = LiveReferences({"teacher_raw": model, "teacher_raw_2": model})(make_batch())
    assert len(runs) == 1
    assert torch.equal(heads["teacher_raw"].hidden, heads["teacher_raw_2"].hidden)


def test_a_teacher_without_a_path_is_its_adapter_on_the_raw_teacher() -> None:
    raw = ModelSpec("raw", "bfloat16", quantization={"quant_method": "x"})
    specs = with_base({"teacher": ModelSpec(adapter="a"), "teacher_raw": raw, "teacher_2": ModelSpec(adapter="b")})
    assert specs["teacher"] == ModelSpec("raw", "bfloat16", quantization={"quant_method": "x"}, adapter="a")
    assert specs["teacher_2"].path is None
    assert shared_weights(specs) == {"teacher_raw": "teacher"}


def test_an_adapter_of_another_base_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter_on(base, tmp_path / "a", 0)
    other = save_model(tmp_path / "other", seed=3, vocab_size=V)
    [problem] = adapter_problems("teacher", ModelSpec(str(other), adapter=str(adapter)))
    assert str(base) in problem
    assert str(other) in problem
    assert adapter_problems("teacher", ModelSpec(str(base), adapter=str(adapter))) == []
    # A record of the base's files is believed more than names.
    (adapter / BASE_FILE).write_text(json.dumps({"path": "first", "version": "0" * 64}), encoding="utf-8")
    [problem] = adapter_problems("teacher", ModelSpec(str(base), adapter=str(adapter)))
    assert "first" in problem


def test_an_adapter_that_cannot_be_switched_off_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter_on(base, tmp_path / "a", 0)
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for key, value in (("bias", "all"), ("init_lora_weights", "pissa"), ("peft_type", "IA3")):
        file.write_text(json.dumps(config | {key: value}), encoding="utf-8")
        [problem] = adapter_problems("teacher", ModelSpec(str(base), adapter=str(adapter)))
        assert str(value) in problem
    [problem] = adapter_problems("teacher", ModelSpec(str(base), adapter=str(base)))
    assert "adapter_config.json" in problem
    [problem] = adapter_problems("student", ModelSpec(str(base), adapter=str(adapter)))
    assert "model/lora" in problem


def test_weights_that_do_not_fit_are_named(base: Path, tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide" / "raw", seed=2, vocab_size=V, width=24)
    adapter = save_adapter_on(base, tmp_path / "a", 0)
    with pytest.raises(ValueError, match=r"model\.teacher\.adapter=.* does not fit"):
        open_model("teacher", ModelSpec(str(wide), adapter=str(adapter)), ModelSettings(), vocabulary=V)


def test_a_lora_run_exports_an_adapter_that_serves_as_a_teacher(world: World, train: Train) -> None:
    """Live, cached, and as two models: the same losses."""
    raw = str(world.root / "teacher_raw")
    tuned = train("sft", "model/lora=default", f"model.student.path={raw}", "optim.lr=0.02", name="tuned")
    pair = (f"model.teacher_raw.path={raw}", "model.teacher.path=null", f"model.teacher.adapter={tuned.adapter}")
    shared = train("delta_kd", *pair, name="shared", drop=("model.teacher.path",)).read_summary()
    apart = train("delta_kd", f"model.teacher.path={tuned.student}", name="apart").read_summary()
    assert shared["val/loss"] == pytest.approx(apart["val/loss"], rel=1e-4)
    with pytest.raises(ConfigError, match="belongs to another base"):
        train("delta_kd", *pair[1:], f"model.teacher_raw.path={world.root / 'teacher'}", name="wrong")
