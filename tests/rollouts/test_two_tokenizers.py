"""Whole runs on the student's own responses, judged by teachers with another tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deltakd.io.run_directory import RunDirectory
from deltakd.models.tokenizers import ALIGNING_LOSSES
from tests.rollouts.runs import ON_POLICY, assert_same_student, column, compare_ranks, stop_after
from tests.tiny import World, save_foreign_teachers, save_model

Train = Callable[..., RunDirectory]
REPLAY = ("rollout.replay.size=4", "rollout.replay.fresh=constant")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that give the world's student teachers with another tokenizer, far from uniform."""
    return save_foreign_teachers(tmp_path_factory.mktemp("foreign"), spreads=(0.4, 0.2))


def test_a_killed_run_on_own_and_kept_responses_makes_the_same_student(
    train: Train, foreign: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = (*ON_POLICY, *REPLAY, *foreign, "trainer.max_steps=4", "trainer.checkpoint_every_n_steps=1")
    whole = train("span_kd", *chosen, name="whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(InterruptedError):
            train("span_kd", *chosen, name="parts")
    assert_same_student(train("span_kd", *chosen, "resume=true", name="parts"), whole)
    assert all(0.3 < share <= 1 for share in column(whole, "data/aligned_fraction"))
    # A model that is not trained writes bytes at random.
    assert max(column(whole, "rollout/invalid_utf8_fraction")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", ALIGNING_LOSSES)
def test_every_loss_that_aligns_learns_from_rows_of_data_and_student(
    loss: str, train: Train, foreign: tuple[str, ...]
) -> None:
    run = train(loss, *ON_POLICY, *foreign, "rollout.fraction=0.5", "trainer.max_steps=30", "optim.lr=0.02")
    name = f"train/{loss}" if f"train/{loss}" in (run.path / "metrics.csv").read_text() else "train/loss"
    losses = column(run, name)
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_zero3"])
def test_two_processes_are_one(world: World, foreign: tuple[str, ...], tmp_path: Path, strategy: str) -> None:
    student = save_model(tmp_path / "plain", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    chosen = (*ON_POLICY, *REPLAY, *foreign, f"model.student.path={student}", "rollout.fraction=0.5")
    compare_ranks(world, tmp_path, "delta_span", chosen, [f"strategy={strategy}"])
