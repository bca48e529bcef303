"""Whole runs whose responses are drawn from a mixture of student and teacher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.generation.noise import NoiseKey
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models import LanguageModel, ModelSpec, load_model
from deltakd.rollouts.engine import OwnEngine, Request
from deltakd.rollouts.settings import RolloutSettings
from tests.rollouts.runs import ON_POLICY, assert_same_student, column, compare_ranks, stop_after
from tests.tiny import World, make_tokenizer, save_model

Train = Callable[..., RunDirectory]
MIXTURE = (*ON_POLICY, "rollout.source=mixture", "rollout.teacher_weight=0.4")


@pytest.mark.parametrize("name", ["opd", pytest.param("minillm", marks=pytest.mark.slow)])
def test_the_student_moves_to_its_target(train: Train, sharp: list[str], name: str) -> None:
    run = train(name, *MIXTURE, *sharp, "trainer.max_steps=20", "data.batch_size=32", "rollout.per_prompt=4")
    curve = column(run, "train/reverse_kl")
    assert sum(curve[-4:]) < 0.9 * sum(curve[:4])
    assert column(run, "rollout/entropy") == column(run, "train/entropy")


@pytest.mark.parametrize("loss", ["opd", "kd"])
def test_a_killed_run_makes_the_same_student(
    train: Train, sharp: list[str], monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """In the middle of a round, whose tokens keep the log-probs with which they were drawn."""
    chosen = (*MIXTURE, *sharp, "rollout.every=3", "trainer.max_steps=6", "trainer.checkpoint_every_n_steps=1")
    whole = train(loss, *chosen, name="whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(InterruptedError):
            train(loss, *chosen, name="parts")
    assert_same_student(whole, train(loss, *chosen, "resume=true", name="parts"))


def test_tokens_remember_the_probability_of_the_mixture(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    vocabulary = len(tokenizer)
    paths = [save_model(tmp_path / str(seed), seed=seed, initializer_range=0.3) for seed in (1, 2)]
    student, teacher = (
        LanguageModel(load_model("student", ModelSpec(str(path)), vocabulary=vocabulary), vocabulary).eval()
        for path in paths
    )
    settings = RolloutSettings(fraction=1.0, source="mixture", teacher_weight=0.3)
    engine = OwnEngine(
        lambda: nullcontext(student), tokenizer, settings, vocabulary, 30, True, lambda: nullcontext(teacher)
    )
    prompts = [[5, 6, 7], [8]]
    answers = engine.answer([Request(prompt, [NoiseKey(0, row, 1)]) for row, prompt in enumerate(prompts)])
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer.tokens]])
        with torch.no_grad():
            probabilities = sum(
                weight * model.hf(ids).logits[0, len(prompt) - 1 : -1, :vocabulary].double().softmax(-1)
                for weight, model in ((0.7, student), (0.3, teacher))
            )
        expected = probabilities.gather(1, torch.tensor(answer.tokens)[:, None]).squeeze(1).log()
        assert answer.log_probs is not None
        torch.testing.assert_close(torch.from_numpy(answer.log_probs).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "sharding"), [("ddp", "replicate"), ("fsdp", "shard"), ("deepspeed_zero3", "shard"), ("ddp", "shard")]
)
def test_two_processes_are_one(world: World, sharp: list[str], tmp_path: Path, strategy: str, sharding: str) -> None:
    student = save_model(tmp_path / "plain", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    chosen = (*MIXTURE, *sharp, f"model.student.path={student}", "rollout.every=2")
    compare_ranks(world, tmp_path, "delta_opd", chosen, [f"strategy={strategy}", f"reference.sharding={sharding}"])


@pytest.mark.parametrize(
    ("loss", "options", "said"),
    [
        ("sft", (), "the loss reads no model.teacher; give a loss that reads it, or rollout.source=student"),
        ("kd", ("reference=cached", "reference.path=x"), "holds the references over the data's responses"),
        ("kd", ("rollout.teacher_weight=0",), "rollout.teacher_weight is 0"),
        ("kd", ("rollout.teacher_weight=1",), "rollout.teacher_weight is 1"),
        ("kd", ("rollout.source=teacher",), "rollout.source is 'teacher'"),
        ("opd", ("rollout.decoding.temperature=0.7",), "rollout.decoding changes it"),
    ],
)
def test_what_cannot_work_is_said(world: World, tmp_path: Path, loss: str, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_settings(compose_config("train", world.overrides(tmp_path / "run", loss, *MIXTURE, *options)))
    assert said in str(caught.value)
