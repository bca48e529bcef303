from __future__ import annotations

import math

import pytest
import torch

from deltakd.generation import Decoding


def test_the_defaults_are_good_and_change_no_logits() -> None:
    assert Decoding().problems() == []
    assert list(Decoding().processors()) == []


def test_all_problems_are_reported_together_and_by_their_keys() -> None:
    bad = Decoding(
        do_sample="yes",  # type: ignore[arg-type]
        temperature=0.0,
        top_k=-1,
        top_p=1.5,
        no_repeat_ngram_size=1,
        max_new_tokens=0,
    )
    keys = [message.split(" ")[0] for message in bad.problems()]
    names = ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "no_repeat_ngram_size")
    assert keys == [f"evaluation.decoding.{name}" for name in names]
    assert "do_sample: false" in bad.problems()[1]


@pytest.mark.parametrize(
    "options", [{"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0}, {"top_k": True}, {"top_k": 2.0}]
)
def test_values_that_look_like_numbers_are_refused(options: dict[str, float]) -> None:
    assert len(Decoding(**options).problems()) == 1  # type: ignore[arg-type]


def test_an_integer_temperature_from_yaml_is_fine() -> None:
    decoding = Decoding(temperature=2, top_k=3, top_p=1)
    assert decoding.problems() == []
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    out = decoding.processors()(torch.zeros(1, 1, dtype=torch.long), logits)
    assert out.tolist() == [[2.0, 1.5, 1.0, -math.inf]]


def test_greedy_decoding_ignores_the_options_of_sampling() -> None:
    greedy = Decoding(do_sample=False, temperature=0.5, top_k=2, top_p=0.5, no_repeat_ngram_size=3)
    assert [type(p).__name__ for p in greedy.processors()] == ["NoRepeatNGramLogitsProcessor"]
