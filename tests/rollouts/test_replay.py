"""Responses of earlier steps that are trained on again, and the share of the student's responses that adapts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.rollouts.replay import Kept, ReplayBuffer, ReplaySettings, StudentShare
from deltakd.rollouts.responses import Prompts, Response
from tests.rollouts.runs import ON_POLICY, assert_same_student, column, compare_ranks, stop_after
from tests.rollouts.test_responses import Echo, loader, trained_rows
from tests.tiny import World, save_model

Train = Callable[..., RunDirectory]


def kept(step: int, *tokens: int) -> list[Kept]:
    return [Kept(token, Prompts([token], None), Response([token, 99], True), step) for token in tokens]


def test_the_buffer_holds_the_newest_of_earlier_steps() -> None:
    buffer = ReplayBuffer(3)
    buffer.add(0, kept(0, 1, 2))
    buffer.add(1, kept(1, 3, 4))
    assert [one.row_id for one in buffer.before(1)] == [1, 2]
    assert [one.row_id for one in buffer.before(2)] == [2, 3, 4]
    buffer.add(1, kept(1, 3, 4))  # dealt out again after a resume
    assert [one.row_id for one in buffer.before(1)] == [1, 2]
    assert [one.row_id for one in buffer.before(2)] == [2, 3, 4]
    assert {one.row_id for one in buffer.draw(2, 3, seed=0)} == {2, 3, 4}
    assert len({tuple(one.row_id for one in buffer.draw(step, 3, seed=0)) for step in range(2, 20)}) > 2


def test_replayed_rows_are_those_of_earlier_steps() -> None:
    """Fewer and fewer are written anew: 1 − t of them, once the buffer is full."""
    engine = Echo()
    made = loader(engine, accumulate=1, replay=ReplaySettings(size=4))
    asked: list[tuple[int, int]] = []
    earlier: list[tuple[int, list[int], list[int]]] = []
    for batch in made:
        asked = [(request.keys[0].step - 1, request.keys[0].row) for request in engine.asked]
        fresh = [row for step, row in asked if step == batch.step]
        rows = trained_rows([batch])
        again = [row for row in rows if row[0] not in fresh or row in earlier]
        assert all(row in earlier for row in again)
        assert len(rows) == 4
        earlier += rows
    # 1 − t of 4 rows, t = 0, 1/6, ...
    assert [[step for step, _ in asked].count(step) for step in range(6)] == [4, 3, 3, 2, 1, 1]
    assert made.metrics["rollout/replayed"] == 3
    assert made.metrics["rollout/replay_age"] >= 1


@pytest.mark.parametrize(("fresh", "counts"), [("constant", [4, 2, 2, 2, 2, 2]), ("increasing", [4, 1, 1, 2, 3, 3])])
def test_other_shares_of_new_responses(fresh: str, counts: list[int]) -> None:
    engine = Echo()
    list(loader(engine, accumulate=1, replay=ReplaySettings(size=4, fresh=fresh)))  # type: ignore[arg-type]
    steps = [request.keys[0].step - 1 for request in engine.asked]
    assert [steps.count(step) for step in range(6)] == counts


def test_a_buffer_smaller_than_a_step_replays_what_it_has() -> None:
    made = loader(Echo(), accumulate=1, replay=ReplaySettings(size=1, fresh="constant"))
    assert [made.metrics["rollout/replayed"] for _ in made] == [0, 1, 1, 1, 1, 1]


def test_the_share_rises_as_in_distillm() -> None:
    """Their loop (finetune.py), whose level starts from a validation before the first step."""
    losses = np.random.default_rng(0).normal(2.0, 0.2, 60)
    share = StudentShare(ReplaySettings(adaptive=True), 1.0)
    threshold, level = 0.0, losses[0]
    share.after_validation(losses[0])
    for loss in losses[1:]:
        if loss >= level + 0.1:
            threshold = min(threshold + 0.1, 1.0)
            level = loss
        share.after_validation(loss)
        assert share.value == pytest.approx(threshold)
    assert 0 < share.value < 1
    for loss in range(30):
        share.after_validation(3.0 + loss)
    assert share.value == 1.0
    again = StudentShare(ReplaySettings(adaptive=True), 1.0)
    again.load_state_dict(share.state_dict())
    assert again.state_dict() == share.state_dict()


ADAPTIVE = (
    "rollout.replay.size=4",
    "rollout.replay.adaptive=true",
    "rollout.replay.start=0.25",
    "rollout.replay.rise=0.25",
    "rollout.replay.tolerance=0",
    "rollout.replay.fresh=constant",
    "trainer.val_every_n_steps=1",
    "loss.ce_weight=0",
    "optim.lr=0.1",
)


def test_an_adaptive_run_is_killed_and_makes_the_same_student(
    train: Train, world: World, sharp: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher without sense makes the data's responses unlikelier, and the student's share rises."""
    chosen = (*ON_POLICY, *sharp, f"data.val={world.root / 'val.jsonl'}", *ADAPTIVE, "trainer.max_steps=8")
    whole = train("kd", *chosen, name="whole")
    shares = column(whole, "rollout/student_fraction")
    assert shares[0] == 0.25
    assert shares == sorted(shares)
    assert shares[-1] > 0.25
    assert max(column(whole, "rollout/replayed")) > 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(InterruptedError):
            train("kd", *chosen, name="parts")
    parts = train("kd", *chosen, "resume=true", name="parts")
    assert_same_student(whole, parts)
    assert column(parts, "rollout/student_fraction") == shares


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_killed_run_replays_the_same_tokens_with_the_same_ratios(
    train: Train, sharp: list[str], monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    replay = ("rollout.replay.size=6", "rollout.replay.fresh=constant", f"rollout.every={every}")
    chosen = (*ON_POLICY, *sharp, *replay, "trainer.max_steps=6", "trainer.checkpoint_every_n_steps=1")
    whole = train("opd", *chosen, name="whole")
    assert sum(column(whole, "rollout/replayed")) > 0
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(InterruptedError):
            train("opd", *chosen, name="parts")
    assert_same_student(whole, train("opd", *chosen, "resume=true", name="parts"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one(world: World, sharp: list[str], tmp_path: Path, strategy: str) -> None:
    student = save_model(tmp_path / "plain", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    val = f"data.val={world.root / 'val.jsonl'}"
    chosen = (*ON_POLICY, *sharp, f"model.student.path={student}", val, *ADAPTIVE, "optim.lr=0.01")
    compare_ranks(world, tmp_path, "delta_kd", chosen, [f"strategy={strategy}"])


@pytest.mark.parametrize(
    ("loss", "options", "said"),
    [
        ("kd", ("rollout.replay.adaptive=true",), "there is no validation data; give data.val=..."),
        ("opd", ("rollout.replay.adaptive=true",), "leaves some rows the data's responses"),
        ("opd", ("rollout.replay.size=9", "loss.ratio_clip=null"), "the weight of such a token has no bound"),
        ("minillm", ("rollout.replay.size=9", "loss.ratio_clip=null"), "give loss.ratio_clip=0.2"),
        ("kd", ("rollout.replay.size=-1",), "rollout.replay.size is -1"),
        ("kd", ("rollout.replay.fresh=never",), "rollout.replay.fresh is 'never'"),
        (
            "kd",
            ("rollout.replay.adaptive=true", "rollout.replay.start=0.6", "rollout.fraction=0.5"),
            "rollout.replay.start is 0.6, above rollout.fraction=0.5",
        ),
        ("kd", ("rollout.replay.adaptive=true", "rollout.per_prompt=2"), "rollout.per_prompt is 2"),
    ],
)
def test_what_cannot_work_is_said(world: World, tmp_path: Path, loss: str, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_settings(compose_config("train", world.overrides(tmp_path / "run", loss, *ON_POLICY, *options)))
    assert said in str(caught.value)
