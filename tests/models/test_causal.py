"""Only models that predict the next token are students, teachers or raw models; others are refused by config alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError
from deltakd.models.causal import NotCausalError, check_causal
from tests.tiny import World


def saved(directory: Path, kind: str, **options: object) -> Path:
    AutoConfig.for_model(kind, **options).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (
            "bert",
            {"architectures": ["BertForMaskedLM"]},
            r"model_type bert, architectures BertForMaskedLM.* an encoder",
        ),
        ("modernbert", {}, r"model_type modernbert\) is that of an encoder, which sees the tokens after"),
        ("t5", {}, "an encoder-decoder"),
        ("bart", {}, "an encoder-decoder"),
        ("vit", {}, "a model without a causal head"),
        ("roberta", {"is_decoder": True}, None),
        ("bart", {"is_encoder_decoder": False, "is_decoder": True}, None),
        ("gpt2", {}, None),
        ("qwen3", {}, None),
        ("vit", {"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, None),
    ],
)
def test_models_that_see_the_future_are_refused(kind: str, options: dict[str, object], said: str | None) -> None:
    config = AutoConfig.for_model(kind, **options)
    if said is None:
        check_causal("model.student", config)
        return
    with pytest.raises(
        NotCausalError, match=rf"^model.student is not a causal language model: .*{said}.*; give a decoder"
    ):
        check_causal("model.student", config)


def test_every_role_is_checked_before_anything_is_read(world: World, tmp_path: Path) -> None:
    bert, t5 = saved(tmp_path / "bert", "bert"), saved(tmp_path / "t5", "t5")
    overrides = [f"model.student.path={bert}", f"model.teacher.path={t5}", f"model.teacher_raw.path={t5}"]
    with pytest.raises(ConfigError) as caught:
        make_settings(compose_config("train", world.overrides(tmp_path / "run", "delta_kd", *overrides)))
    problems = caught.value.problems
    assert [problem.split(".path=")[0] for problem in problems] == [
        f"model.{role}" for role in ("student", "teacher", "teacher_raw", "student_raw")
    ]


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("{model_type: bert}", "model.student.architecture is not a causal language model"),
        ("{model_type: lama}", "model_type is 'lama', which transformers does not know; the nearest is 'llama'"),
        (
            "{model_type: gpt2, n_embd: wide}",
            r"architecture is not a valid gpt2: .*'n_embd'.*expected int.*; correct its keys",
        ),
    ],
)
def test_a_wrong_architecture_from_scratch_is_refused_with_the_config(
    world: World, tmp_path: Path, architecture: str, said: str
) -> None:
    overrides = [
        "model.student.init=random",
        "model.student.path=null",
        f"model.student.tokenizer={world.root / 'teacher'}",
        f"model.student.architecture={architecture}",
    ]
    with pytest.raises(ConfigError, match=said):
        make_settings(compose_config("train", world.overrides(tmp_path / "run", "sft", *overrides)))
