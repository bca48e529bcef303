"""Models: heads in parity with the models' own logits, tokenizers, loading, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from deltakd.io.typed import typed
from deltakd.models import (
    LanguageModel,
    LoraSpec,
    ModelSpec,
    common_vocabulary,
    load_model,
    spec_problems,
    train_tokenizer,
)
from deltakd.models.lora import add_lora
from deltakd.models.saving import save_student
from deltakd.models.tokenizers import OtherTokenizerError
from deltakd.types import IGNORE_INDEX, Batch
from tests.tiny import make_rows, make_tokenizer, save_model

V = 300
FAMILIES = {
    "gpt2": {},
    "llama": {"tie_word_embeddings": False},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "opt": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "gpt_neox": {},
    "phi3": {},
}


def make_batch() -> Batch:
    """Two rows of unequal length; the prompt and the padding are not trained on."""
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.clone()
    labels[:, :4] = IGNORE_INDEX
    labels[mask == 0] = IGNORE_INDEX
    return Batch(ids, mask, labels, torch.arange(2), 0, 7)


def load(path: Path, vocabulary: int = V) -> LanguageModel:
    return LanguageModel(load_model("student", ModelSpec(str(path)), vocabulary=vocabulary), vocabulary)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_the_models_own_logits_at_the_tokens_before_the_labels(family: str, tmp_path: Path) -> None:
    path = save_model(tmp_path, seed=1, family=family, vocab_size=V + 12, **FAMILIES[family])
    model = load(path).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # initial weights give logits near 0, where a soft cap does nothing
    model.check_head()
    batch = make_batch()
    head = model(batch)
    logits_BTV = model.hf(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = torch.cat([logits_BTV[0, 3:8], logits_BTV[1, 3:5]])[:, :V]
    torch.testing.assert_close(head.logits(), expected, rtol=1e-4, atol=1e-4)
    assert batch.labels_N.tolist() == [*batch.input_ids[0, 4:].tolist(), *batch.input_ids[1, 4:6].tolist()]


def test_an_unknown_transformation_of_logits_is_refused(tmp_path: Path) -> None:
    model = load(save_model(tmp_path, seed=1))
    original = model.hf.forward

    def doubled(*args: object, **kwargs: object) -> object:
        output = original(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.hf.forward = doubled
    with pytest.raises(ValueError, match="GPT2LMHeadModel: body and head differ from the model's own logits by"):
        model.check_head()


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "q_proj"]])
def test_lora_also_on_the_head(targets: str | list[str], tmp_path: Path) -> None:
    path = save_model(tmp_path, seed=1, family="llama")
    base = load_model("student", ModelSpec(str(path)), vocabulary=V)
    raw = base(make_batch().input_ids).logits.detach()
    model = LanguageModel(add_lora(base, LoraSpec(r=2, target_modules=targets)), V)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    batch = make_batch()
    batch.attention_mask = torch.ones_like(batch.attention_mask)
    own = model.hf(input_ids=batch.input_ids).logits[:, :-1][batch.valid_BT]
    torch.testing.assert_close(model(batch).logits(), own, rtol=1e-4, atol=1e-5)
    model(batch).logits().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name)
    model.train()
    with model.adapter_off():
        torch.testing.assert_close(model(batch).logits(), raw[:, :-1][batch.valid_BT], rtol=1e-5, atol=1e-6)
        assert not model.training
    assert model.training


def test_fewer_rows_than_tokens_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the tokenizer has 301 tokens but the model's output embedding has 300 rows"):
        load(save_model(tmp_path, seed=1, vocab_size=300), 301)


def test_a_checkpoint_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": V}
    BertModel(BertConfig(**tiny, is_decoder=True)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not a causal language model of type bert: \d+ weights are absent"):
        load(tmp_path)


def test_from_scratch_is_drawn_from_the_seed_and_leaves_the_global_stream_alone() -> None:
    architecture = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
    spec = ModelSpec(init="random", architecture=architecture)
    before = torch.get_rng_state()
    first, again, other = (load_model("student", spec, vocabulary=V, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    name = "transformer.wte.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert first[name].shape == (V, 8)


def test_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    path = save_model(tmp_path, seed=1)
    model = load_model("teacher", ModelSpec(str(path), dtype="bfloat16"), vocabulary=V)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec(), "model.teacher.path is missing"),
        (ModelSpec("a/b/c"), "no such directory"),
        (ModelSpec(init="random"), "needs model.teacher.architecture with a model_type"),
        (ModelSpec("."), "is a directory without config.json"),
    ],
)
def test_problems_of_a_spec(spec: ModelSpec, message: str) -> None:
    (problem,) = spec_problems("teacher", spec)
    assert message in problem


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"path": "gpt2", "dtype": "int8"},
            "model.teacher.dtype is 'int8'; it must be float32, bfloat16, float16, float64",
        ),
        ({"path": "gpt2", "init": "zeros"}, "model.teacher.init is 'zeros'; it must be pretrained, random"),
        ({"path": 123}, "model.teacher.path is 123; it must be text or null; to give these digits as text: "),
    ],
)
def test_wrong_types_in_a_spec_are_told(entry: dict[str, object], message: str) -> None:
    problems: list[str] = []
    assert typed(ModelSpec, entry, "model.teacher", problems) is not None
    (problem,) = problems
    assert problem.startswith(message)


def test_tokenizers_are_compared_by_their_tokens() -> None:
    ours = make_tokenizer()
    assert common_vocabulary(ours, make_tokenizer(), "teacher") == len(ours)
    padded = make_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert common_vocabulary(ours, padded, "teacher") == len(ours)
    extended = make_tokenizer()
    extended.add_tokens(["<think>"])
    assert common_vocabulary(ours, extended, "teacher") == common_vocabulary(extended, ours, "teacher") == len(ours)
    longer = train_tokenizer([json.dumps(row) for row in make_rows(50, 0)], len(ours) + 5)
    with pytest.raises(OtherTokenizerError, match=r"the student's has \d+ tokens, the teacher's \d+ \(first extra: "):
        common_vocabulary(ours, longer, "teacher")
    other_end = make_tokenizer()
    other_end.eos_token = "<other>"
    with pytest.raises(ValueError, match=r"eos_token is '<\|endoftext\|>' in the student, '<other>' in the teacher"):
        common_vocabulary(ours, other_end, "teacher")
    with pytest.raises(ValueError, match=r"tokens differ \(id \d+: student '.*', teacher '.*'"):
        common_vocabulary(ours, train_tokenizer(["entirely other words here"] * 3, 300), "teacher")


def test_real_tokenizers_of_two_families_are_told_apart(shared_dir: Path) -> None:
    gpt2 = AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / "gpt2")
    llama = AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / "tinyllama")
    assert common_vocabulary(gpt2, gpt2, "teacher") == 50257
    with pytest.raises(ValueError, match=r"tokens differ \(id 0: student '!', teacher '<unk>'"):
        common_vocabulary(gpt2, llama, "teacher")


def test_same_tokens_with_other_merges_are_told_apart(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][::-1][:3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="they cut the same text into different tokens"):
        common_vocabulary(make_tokenizer(), AutoTokenizer.from_pretrained(tmp_path), "teacher")


def test_trained_tokenizer_round_trips_any_text() -> None:
    tokenizer = make_tokenizer()
    text = "Été — 漢字\n\ttabs  and   spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(["a"], 100)


def test_export_is_whole_and_opens_without_us(tmp_path: Path) -> None:
    model = load(save_model(tmp_path / "in", seed=1))
    save_student(model, make_tokenizer(), tmp_path / "out", "# card")
    save_student(model, make_tokenizer(), tmp_path / "out", "# another card")
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "README.md"} <= files
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(2, 9)[None]
    assert torch.equal(opened(ids).logits, model.hf.eval()(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "gpt2"
    assert not (tmp_path / "out.partial").exists()
