"""What a role needs is opened in one way, and refused with the key to set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltakd.models import ModelSettings, ModelSpec, common_vocabulary
from deltakd.models.identity import count_parameters, model_fingerprint, model_identity, model_version, spec_of
from deltakd.models.roles import (
    open_exported,
    open_model,
    open_reference,
    open_tokenizer,
    open_vocabularies,
)
from deltakd.models.settings import LoraSpec, TokenizerSettings
from deltakd.models.vocabulary import vocabulary_of
from deltakd.types import STUDENT, STUDENT_RAW, TEACHER
from tests.tiny import World, make_rows, make_tokenizer, save_model

CPU = torch.device("cpu")
SETTINGS = ModelSettings()


def spec(path: Path, **options: str) -> ModelSpec:
    return ModelSpec(path=str(path), **options)  # type: ignore[arg-type]


def test_a_role_and_an_exported_student_are_the_model_that_transformers_opens(world: World) -> None:
    path = world.root / "teacher"
    vocabulary = vocabulary_of(AutoTokenizer.from_pretrained(path))
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.tensor([[5, 9, 2]])
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        exported = open_exported(path, SETTINGS, vocabulary, CPU)
        opened = open_model(TEACHER, spec(path), SETTINGS, vocabulary=vocabulary)
        head = opened.eval().head_of(opened.hidden_states(ids, torch.ones_like(ids))[0])
        torch.testing.assert_close(exported(input_ids=ids).logits, expected, rtol=0, atol=0)
        torch.testing.assert_close(head.logits(), expected[0, :, :vocabulary])
    assert not exported.training
    double = open_model(TEACHER, spec(path, dtype="float64"), SETTINGS, vocabulary=vocabulary)
    assert next(double.parameters()).dtype == torch.float64


def test_what_does_not_fit_is_refused(world: World, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.root / "student_raw")
    teacher = spec(world.root / "teacher")
    with pytest.raises(ValueError, match=r"max_length is 500, but model.teacher has positions for 128 tokens only"):
        open_model(TEACHER, teacher, SETTINGS, vocabulary=300, max_length=500)
    with pytest.raises(ValueError, match=r"model=/no/such: no model can be loaded from there .*; give a model dir"):
        open_exported("/no/such", SETTINGS, 300, CPU)
    with pytest.raises(ValueError, match=r"model.teacher.path=/no/such: no such directory"):
        open_reference(TEACHER, spec(Path("/no/such")), SETTINGS, tokenizer, 300)
    bare = make_tokenizer()
    bare.eos_token = None
    save_model(tmp_path / "bare", seed=1)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"model.student.path=.*bare: the tokenizer has no EOS token"):
        open_tokenizer(ModelSettings(specs={STUDENT: spec(tmp_path / "bare")}), tmp_path / "none")
    other = make_tokenizer()
    other.eos_token = "<another>"
    save_model(tmp_path / "other", seed=1, tokenizer=other)
    with pytest.raises(ValueError, match="the teacher has another tokenizer than the student"):
        open_reference(TEACHER, spec(tmp_path / "other"), SETTINGS, tokenizer, 300)
    specs = {STUDENT: spec(world.root / "student_raw"), TEACHER: spec(tmp_path / "other")}
    with pytest.raises(ValueError, match="the teacher has another tokenizer than the student"):
        open_vocabularies(SETTINGS, specs, tokenizer)


def test_a_model_of_few_positions_is_opened_all_the_same(tmp_path: Path) -> None:
    short = save_model(tmp_path / "short", seed=4, n_positions=4)
    tokenizer = AutoTokenizer.from_pretrained(short)
    model = open_reference(TEACHER, spec(short), SETTINGS, tokenizer, vocabulary_of(tokenizer))
    assert model.causal_lm.config.max_position_embeddings == 4


def test_a_trained_tokenizer_is_kept_for_the_next_start(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(json.dumps(row) for row in make_rows(50, 0)), encoding="utf-8")
    student = ModelSpec(init="random", architecture={"model_type": "gpt2"})
    models = ModelSettings(specs={STUDENT: student}, tokenizer=TokenizerSettings(train_on=str(text), vocabulary=280))
    first = open_tokenizer(models, tmp_path / "tokenizer")
    text.unlink()
    again = open_tokenizer(models, tmp_path / "tokenizer")
    assert common_vocabulary(first, again, TEACHER) == vocabulary_of(first) == 280
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]


def test_padding_that_one_model_lacks_is_no_part_of_the_shared_vocabulary(world: World, tmp_path: Path) -> None:
    padded = make_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    save_model(tmp_path / "padded", seed=1, tokenizer=padded)
    specs = {STUDENT: spec(tmp_path / "padded"), TEACHER: spec(world.root / "teacher")}
    assert open_vocabularies(SETTINGS, specs, padded).size == len(padded) - 1
    assert open_vocabularies(SETTINGS, {STUDENT: specs[STUDENT]}, padded).size == len(padded)


def test_which_model_it_is(world: World, tmp_path: Path) -> None:
    teacher, other = spec(world.root / "teacher"), spec(tmp_path / "gone")
    identity = model_identity(teacher)
    assert identity["sha256"] == model_fingerprint(str(teacher.path)) == model_version(str(teacher.path))
    assert identity["commit"] is None
    assert model_identity(other)["sha256"] is None
    models = ModelSettings(specs={STUDENT: teacher, STUDENT_RAW: other})
    assert spec_of(models, STUDENT_RAW) == other
    # With LoRA the raw student is the student's own base.
    assert spec_of(ModelSettings(specs=models.specs, lora=LoraSpec()), STUDENT_RAW) == teacher
    assert spec_of(models, TEACHER) is None
    assert count_parameters({"layer": torch.nn.Linear(3, 2)}) == {"layer": 8}
