from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from deltakd.config.compose import compose_config
from deltakd.config.protocols import deviations, evaluation_group, make_evaluation
from deltakd.data import DataConfig, InstructionData
from deltakd.evaluation.settings import EvaluationSettings


def group(name: str = "default", *changes: str) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(OmegaConf.merge(evaluation_group(name), OmegaConf.from_dotlist([*changes])))
    return found


def made(name: str = "default", *changes: str) -> EvaluationSettings:
    problems: list[str] = []
    evaluation = make_evaluation(group(name, *changes), problems)
    assert problems == []
    assert evaluation is not None
    return evaluation


def test_minillm_is_its_scripts_but_for_the_ban() -> None:
    plain, banned = made("minillm"), made("minillm_ngram")
    assert plain.seeds == banned.seeds == [10, 20, 30, 40, 50]
    assert (plain.template, plain.max_prompt_length, plain.limit, plain.scorer) == ("alpaca", 256, None, "rouge")
    options = vars(plain.decoding)
    assert options == {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "no_repeat_ngram_size": 0,
        "max_new_tokens": 256,
    }
    assert vars(banned.decoding) == options | {"no_repeat_ngram_size": 6}
    composed = compose_config("train", ["evaluation=minillm_ngram"]).evaluation
    assert OmegaConf.to_container(composed) == group("minillm_ngram")


def test_what_differs_from_the_protocol_is_told() -> None:
    for protocol in ("minillm", "minillm_ngram", "gsm8k"):
        assert deviations(made(protocol, "batch_size=7", "val_limit=3")) == ()
    changes = ("seeds=[10]", "decoding.temperature=0.7", "template=null")
    assert deviations(made("minillm", *changes)) == (
        "seeds is [10] instead of [10, 20, 30, 40, 50]",
        "decoding.temperature is 0.7 instead of 1.0",
        "template is null instead of alpaca",
    )
    sets = (
        "sets.a.source=a",
        "sets.b.source=b",
        "sets.b.scorer=final_number",
        "sets.c.source=c",
        "sets.c.scorer=rouge",
    )
    assert deviations(made("minillm", *sets)) == ("sets.b.scorer is final_number instead of rouge",)
    assert deviations(made()) == ()


def test_a_protocols_template_has_to_be_that_of_training() -> None:
    def data(**options: Any) -> DataConfig:
        return InstructionData(train=__file__, **options)

    evaluation = made("minillm")
    assert evaluation.problems(data()) == []
    (problem,) = evaluation.problems(data(template="chat"))
    assert problem.startswith("evaluation.template is 'alpaca', but data.template is 'chat'")
    asked = evaluation.prompts_of(data(max_prompt_length=128))
    assert (asked.template, asked.max_prompt_length) == ("alpaca", 256)
    assert made().prompts_of(data(max_prompt_length=128)).max_prompt_length == 128


def test_a_set_may_have_a_scorer_and_a_limit_of_its_own() -> None:
    evaluation = made("gsm8k", "sets={a: a.jsonl, b: {source: b.jsonl, scorer: rouge, limit: 5}}", "limit=9")
    assert [evaluation.scorer_of(name) for name in "ab"] == ["final_number", "rouge"]
    assert [evaluation.limit_of(name) for name in "ab"] == [9, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scorer=bleu", "evaluation.scorer is 'bleu'; it must be rouge, final_number or null"),
        ("sets={a: {source: x, scorer: y}}", "evaluation.sets.a.scorer is 'y'"),
        ("sets={a: {file: x}}", "evaluation.sets.a is {'file': 'x'}; give names and files"),
        ("sets={a: {source: x, limits: 1}}", "evaluation.sets.a has no key 'limits'"),
        ("max_prompt_length=0", "evaluation.max_prompt_length is 0; it must be a whole number from 1 or null"),
        ("protocol=mine", "these are protocols: gsm8k, minillm, minillm_ngram"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(change: str, message: str) -> None:
    problems: list[str] = []
    make_evaluation(group("default", change), problems)
    assert any(message in problem for problem in problems), problems
