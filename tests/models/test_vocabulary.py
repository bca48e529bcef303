"""Tokens beyond a model's head: cut where no text is encoded as one, refused where data can hold them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from deltakd.generation.model_step import positions_of
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models.vocabulary import vocabulary_of
from tests.tiny import make_tokenizer, save_model

IMAGE = "<image>"


def with_image_token() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return tokenizer


def test_only_special_tokens_beyond_the_head_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = with_image_token()
    v = len(tokenizer)
    with caplog.at_level(logging.INFO):
        assert vocabulary_of(tokenizer, AutoConfig.for_model("llama", vocab_size=v - 1)) == v - 1
    assert "<image> are cut" in caplog.text
    assert vocabulary_of(tokenizer, AutoConfig.for_model("llama", vocab_size=v + 7)) == v
    with pytest.raises(
        ValueError, match=rf"the tokenizer has {v} tokens but .* has {v - 3} rows \(teacher\), none for"
    ):
        vocabulary_of(tokenizer, AutoConfig.for_model("llama", vocab_size=v - 3), "teacher")
    tokenizer.add_tokens(["word"])
    with pytest.raises(ValueError, match="none for word"):
        vocabulary_of(tokenizer, AutoConfig.for_model("llama", vocab_size=v - 1))
    late = make_tokenizer()
    late.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ValueError, match="none for <end>"):
        vocabulary_of(late, AutoConfig.for_model("llama", vocab_size=len(late) - 1))


def test_a_nested_config_has_the_rows_of_its_text_decoder() -> None:
    tokenizer = with_image_token()
    config = AutoConfig.for_model("gemma3", text_config={"vocab_size": len(tokenizer) - 1})
    assert vocabulary_of(tokenizer, config) == len(tokenizer) - 1


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Overrides for a run in which no head has a row for the image token."""
    tokenizer = with_image_token()
    options = {"tokenizer": tokenizer, "vocab_size": len(tokenizer) - 1, "width": 24}
    paths = {role: save_model(tmp_path / role, seed=i, **options) for i, role in enumerate(("student", "teacher"))}
    return [f"model.{role}.path={path}" for role, path in paths.items()]


def test_a_run_without_the_image_token(train: Callable[..., RunDirectory], models: list[str]) -> None:
    run = train("kd", *models, "trainer.max_steps=2", "evaluation=default", "evaluation.val_limit=2")
    assert len(AutoTokenizer.from_pretrained(run.student)) == len(with_image_token())
    assert run.read_summary()["meta"]["steps"] == 2


def test_a_template_that_writes_the_image_token_is_named(train: Callable[..., RunDirectory], models: list[str]) -> None:
    template = "data.template={with_input:'<image>{instruction}: {input}>',without_input:'{instruction}>',tail:'>'}"
    with pytest.raises(ConfigError, match=r"train: 32 rows \(0, 2.*\) hold <image>, which the models don't have"):
        train("kd", *models, template)


@pytest.mark.parametrize(
    ("kind", "options", "limit"),
    [
        ("gpt2", {"n_positions": 77}, 77),
        ("gemma3", {"text_config": {"max_position_embeddings": 99}}, 99),
        ("mpt", {"max_seq_len": 55}, 55),
        ("mamba", {}, None),
        ("qwen2", {"max_position_embeddings": 100, "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e4}}, 400),
        ("llama", {"max_position_embeddings": 131072, "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, 131072),
    ],
)  # fmt: skip
def test_positions_of_a_config(kind: str, options: dict[str, object], limit: int | None) -> None:
    assert positions_of(AutoConfig.for_model(kind, **options)) == limit
