"""Rows in pairs: the data's response and the student's to the same prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.data.encoding.encoded_set import Encoded
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.rollouts.responses import last_response
from deltakd.types import IGNORE_INDEX
from tests.rollouts.runs import ON_POLICY, assert_same_student, column, compare_ranks, stop_after
from tests.rollouts.test_responses import Echo, loader, trained_rows
from tests.tiny import World, save_model

Train = Callable[..., RunDirectory]


def test_only_the_last_response_of_a_conversation_is_compared() -> None:
    row = Encoded([1, 2, 3, 4, 5, 6, 7], [IGNORE_INDEX, 2, IGNORE_INDEX, IGNORE_INDEX, 5, 6, IGNORE_INDEX], 0)
    assert last_response(row).labels == [IGNORE_INDEX] * 4 + [5, 6, IGNORE_INDEX]


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("per_prompt", [1, 2])
def test_each_response_follows_that_of_the_data(ranks: int, accumulate: int, per_prompt: int) -> None:
    parts = [list(loader(Echo(), rank, ranks, accumulate, pairs=True, per_prompt=per_prompt)) for rank in range(ranks)]
    for step in range(6):
        batches = [batch for part in parts for batch in part if batch.step == step]
        rows = [row for batch in batches for row in trained_rows([batch])]
        assert len(rows) == 4
        for given, own in zip(rows[::2], rows[1::2], strict=True):
            assert given[0] == own[0]
            assert given[1][-2:] == [50, 51]
            assert own[1][-1] == 99
        for batch in batches:
            assert batch.pairs is not None
            assert (batch.pairs.pairs, batch.pairs.given_tokens) == (2, 4)
            pairs = batch.facts_N.pairs
            assert pairs is not None
            assert pairs.tokens_per_pair == batch.step_tokens / 2
            assert torch.equal(pairs.given, torch.isin(batch.labels_N, torch.tensor([50, 51])))


def test_the_data_s_responses_become_the_preferred_ones(train: Train, world: World) -> None:
    val = f"data.val={world.root / 'val.jsonl'}"
    run = train("dpkd", *ON_POLICY, val, "loss.ce_weight=0", "trainer.max_steps=16", "data.batch_size=16")
    curve = column(run, "train/preference")
    assert sum(curve[-4:]) < sum(curve[:4])
    assert column(run, "train/preferred")[-1] > 0.5
    assert column(run, "val/loss") == column(run, "val/ce")
    assert not column(run, "rollout/entropy")


def test_a_killed_run_makes_the_same_student(train: Train, sharp: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = (*ON_POLICY, *sharp, "rollout.every=3", "trainer.max_steps=6", "trainer.checkpoint_every_n_steps=1")
    whole = train("dpkd", *chosen, name="whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(InterruptedError):
            train("dpkd", *chosen, name="parts")
    assert_same_student(whole, train("dpkd", *chosen, "resume=true", name="parts"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_zero3"])
def test_two_processes_are_one(world: World, sharp: list[str], tmp_path: Path, strategy: str) -> None:
    student = save_model(tmp_path / "plain", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    compare_ranks(
        world, tmp_path, "dpkd", (*ON_POLICY, *sharp, f"model.student.path={student}"), [f"strategy={strategy}"]
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("rollout=none",), "rollout.fraction is 0; give rollout=student with rollout.fraction=1, or another loss"),
        (("rollout.fraction=0.5",), "rollout.fraction is 0.5; give rollout=student"),
        (("rollout.replay.adaptive=true",), "rollout.replay.adaptive is true"),
        (("rollout.source=mixture",), "rollout.source is mixture; give rollout.source=student"),
        (("rollout.replay.size=5",), "rollout.replay.size=5 brings back responses to other prompts"),
        (("data.batch_size=3",), "which must be in one micro-batch; give an even number"),
    ],
)
def test_what_cannot_work_is_said(world: World, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    chosen = [o for o in ON_POLICY if not ("rollout=none" in options and o.startswith("rollout"))]
    with pytest.raises(ConfigError) as caught:
        make_settings(compose_config("train", world.overrides(tmp_path / "run", "dpkd", *chosen, *options)))
    assert said in str(caught.value)


def test_rows_need_a_response(train: Train, world: World) -> None:
    file = world.root / "prompts_alone.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"one two {n}>"}) + "\n" for n in range(6)))
    with pytest.raises(ValueError, match="response"):
        train("dpkd", *ON_POLICY, f"data.train={file}")
