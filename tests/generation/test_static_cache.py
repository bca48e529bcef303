"""A static key-value cache gives the tokens of a growing one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from deltakd.generation import Decoding
from deltakd.generation.generator import sample
from deltakd.generation.model_step import Mixture
from deltakd.generation.noise import NoiseKey
from deltakd.generation.static_cache import StaticKeyValues

from .tiny_models import EOS, PAD, VOCAB, make_model, make_prompts

#: Of very different lengths, with many ends of text, so that rows leave, join and move.
PROMPTS = make_prompts(9)
ENDS = frozenset(range(1, VOCAB, 12))


def run(model: Any, static_cache: bool, **options: Any) -> list[list[list[int]]]:
    settings: dict[str, Any] = {
        "decoding": Decoding(max_new_tokens=9),
        "batch_size": 4,
        "eos_ids": ENDS,
        "vocab_size": VOCAB,
        "pad_id": PAD,
        **options,
    }
    keys = [[NoiseKey(3, 7 * row, sample=n) for n in range(1 + row % 2)] for row in range(len(PROMPTS))]
    answers = sample(model, PROMPTS, keys, static_cache=static_cache, **settings)
    return [[list(answer.tokens) for answer in own] for own in answers]


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "opt"])
def test_tokens_are_those_of_a_growing_cache(family: str) -> None:
    model = make_model(family)
    for options in ({}, {"eos_ids": frozenset({EOS}), "batch_size": 8}):
        assert run(model, True, **options) == run(model, False, **options)


def test_attention_that_adds_its_mask_works_likewise() -> None:
    model = make_model("llama", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    greedy = Decoding(do_sample=False, no_repeat_ngram_size=2, max_new_tokens=9)
    assert run(model, True, decoding=greedy) == run(model, False, decoding=greedy)


def test_answers_up_to_the_last_position_move_the_cache_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps than columns: rows that need few of them are moved to the first ones again."""
    monkeypatch.setattr("deltakd.generation.key_values.COLUMNS", 1)
    moved: list[tuple[int, int]] = []
    plain = StaticKeyValues._move

    def move(self: StaticKeyValues, used: int, end: int) -> None:
        moved.append((self.end, end))
        plain(self, used, end)

    monkeypatch.setattr(StaticKeyValues, "_move", move)
    model = make_model("llama")
    options = {"decoding": Decoding(max_new_tokens=24), "batch_size": 3}
    assert run(model, True, **options) == run(model, False, **options)
    assert any(end < before for before, end in moved)


def test_both_models_of_a_mixture_have_one() -> None:
    mixture = Mixture(make_model("gpt2"), 0.3)
    model = make_model("llama")
    assert run(model, True, mixture=mixture) == run(model, False, mixture=mixture)


def test_models_that_it_does_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"can't be static: it has layers with a sliding window; give static_cache=fal"
    ):
        run(make_model("gemma2"), True)
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(
        ValueError, match="BloomForCausalLM can't decode with a static cache: it counts positions itself"
    ):
        run(bloom, True)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="it keeps more than keys"):
        run(mamba, True)


@pytest.mark.parametrize("static_cache", [False, True])
def test_a_row_that_has_ended_bans_no_token_of_the_others(static_cache: bool) -> None:
    """Its later columns belong to no text; an n-gram ban must not read them as ids."""
    model = make_model("llama")
    greedy = Decoding(do_sample=False, no_repeat_ngram_size=2, max_new_tokens=9)
    together = run(model, static_cache, decoding=greedy, batch_size=4)
    assert together == run(model, False, decoding=greedy, batch_size=1)
