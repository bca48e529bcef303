"""Rounds of responses, as rows and as part of a checkpoint; requests of a step; what the engine says of its tokens."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from deltakd.data.batches.sampler import StepSampler
from deltakd.data.encoding.encoded_set import Encoded, EncodedSet, flatten
from deltakd.rollouts.engine import Engine, Request
from deltakd.rollouts.replay import ReplaySettings
from deltakd.rollouts.responses import Response, Round, StepPlan, answered, prompt_of
from deltakd.rollouts.rollout_loader import RolloutLoader
from deltakd.rollouts.settings import RolloutSettings
from deltakd.types import IGNORE_INDEX, Batch

_ = IGNORE_INDEX
ROWS = 10


class Echo:
    """Answers with the prompt's first token, as often as the noise key's step and number say, and EOS (99)."""

    def __init__(self, log_probs: bool = False) -> None:
        self.asked: list[Request] = []
        self.metrics: dict[str, float] = {}
        self.log_probs = log_probs

    def answer(self, requests: Sequence[Request]) -> list[Response]:
        self.asked += requests
        made = []
        for request in requests:
            for key in request.keys:
                tokens = [request.prompt[0]] * (key.step % 3 + key.sample) + [99]
                log_probs = -np.arange(1, len(tokens) + 1, dtype=np.float32) if self.log_probs else None
                made.append(Response(tokens, True, log_probs))
        return made


def rows() -> EncodedSet:
    """Row i: a prompt of i + 1 tokens i, a response of two tokens."""
    ids = [[i] * (i + 1) + [50, 51] for i in range(ROWS)]
    labels = [[_] * (i + 1) + [50, 51] for i in range(ROWS)]
    flat, offsets = flatten(ids)
    return EncodedSet(flat, flatten(labels)[0], offsets, np.arange(100, 100 + ROWS), {}, "")


def loader(
    engine: Engine, rank: int = 0, world_size: int = 1, accumulate: int = 2, pairs: bool = False, **options: object
) -> RolloutLoader:
    settings = RolloutSettings(**({"fraction": 1.0} | options))  # type: ignore[arg-type]
    encoded, batch_size = rows(), 4 // (world_size * accumulate)
    sampler = StepSampler(
        encoded.lengths,
        encoded.valid_tokens,
        batch_size=4 // settings.per_prompt // (2 if pairs else 1),
        accumulate=1,
        world_size=1,
        rank=0,
        seed=5,
        epochs=None,
        max_steps=6,
        group_by_length=False,
    )
    place = {"rank": rank, "world_size": world_size, "pairs": pairs}
    return RolloutLoader(
        encoded, sampler, engine, settings, pad_id=0, batch_size=batch_size, accumulate=accumulate, seed=7, **place
    )


def trained_rows(batches: Sequence[Batch]) -> list[tuple[int, list[int], list[int]]]:
    """(row id, tokens, labels) of each row, without padding."""
    found = []
    for batch in batches:
        for row_id, ids, labels, mask in zip(
            batch.row_ids.tolist(), batch.input_ids, batch.labels, batch.attention_mask.bool(), strict=True
        ):
            found.append((row_id, ids[mask].tolist(), labels[mask].tolist()))
    return found


def test_the_prompt_is_what_stands_before_the_last_response() -> None:
    assert prompt_of(Encoded([1, 2, 3, 4, 5, 6], [_, _, 3, _, 5, 6], 0)) == [1, 2, 3, 4]
    assert prompt_of(Encoded([1, 2], [_, _], 0)) == [1, 2]


def test_all_tokens_of_a_response_are_trained_and_none_of_its_prompt() -> None:
    row = answered(3, [1, 2], Response([7, 8, 99], True))
    assert (row.input_ids, row.labels, row.row_id) == ([1, 2, 7, 8, 99], [_, _, 7, 8, 99], 3)


@pytest.mark.parametrize("log_probs", [False, True])
def test_a_round_survives_a_checkpoint(log_probs: bool) -> None:
    values = np.array([-0.5, -1.25], dtype=np.float32) if log_probs else None
    last = None if values is None else values[:1]
    empty = Response([], False, None if last is None else last[:0])
    plans = [StepPlan(1, 1), StepPlan(3, 1), StepPlan(2, 1)]
    made = Round(4, plans, [[Response([1, 2], True, values)], [empty], [Response([3], False, last)]])
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    again = Round.from_state(torch.load(file, weights_only=True))
    assert (again.first_step, again.plans) == (4, plans)
    assert [[(r.tokens, r.finished) for r in step] for step in again.steps] == [
        [([1, 2], True)],
        [([], False)],
        [([3], False)],
    ]
    if log_probs:
        np.testing.assert_array_equal(again.responses(4)[0].log_probs, values)


def test_every_batch_knows_the_valid_tokens_of_its_whole_step() -> None:
    batches = list(loader(Echo()))
    for step in range(6):
        own = [batch for batch in batches if batch.step == step]
        assert len(own) == 2
        assert {batch.step_tokens for batch in own} == {sum(len(batch.valid_N) for batch in own)}


@pytest.mark.parametrize(
    "options", [{}, {"per_prompt": 2}, {"fraction": 0.5}, {"every": 2}, {"replay": ReplaySettings(size=5)}]
)
def test_ranks_and_accumulation_share_the_rows_of_one_process(options: dict[str, object]) -> None:
    whole = list(loader(Echo(), accumulate=1, **options))
    for ranks, accumulate in ((1, 2), (2, 1), (2, 2), (4, 1)):
        parts = [list(loader(Echo(), rank, ranks, accumulate, **options)) for rank in range(ranks)]
        for step in range(6):
            of_step = [batch for part in parts for batch in part if batch.step == step]
            expected = [batch for batch in whole if batch.step == step]
            assert sorted(trained_rows(of_step)) == sorted(trained_rows(expected))
            assert {batch.step_tokens for batch in of_step} == {expected[0].step_tokens}


def test_noise_belongs_to_seed_row_step_and_sample() -> None:
    engine = Echo()
    list(loader(engine, per_prompt=2))
    keys = [key for request in engine.asked for key in request.keys]
    assert len(set(keys)) == len(keys) == 24
    assert {key.seed for key in keys} == {7}
    assert {key.step for key in keys} == set(range(1, 7))
    assert {key.row for key in keys} <= set(range(100, 110))
    assert {key.sample for key in keys} == {0, 1}


def test_a_fraction_leaves_the_others_their_own_responses() -> None:
    found = trained_rows(list(loader(Echo(), fraction=0.25)))
    given = [ids for _, ids, _ in found if ids[-2:] == [50, 51]]
    assert len(given) == 18
    assert sum(ids[-1] == 99 for _, ids, _ in found) == 6


def test_a_round_serves_several_steps_with_what_was_sampled_before() -> None:
    engine = Echo(log_probs=True)
    made = loader(engine, every=4)
    batches = list(made)
    # Steps 0 to 3 and 4 to 5 were asked for in two rounds, step 2's rows with its own keys.
    assert [request.keys[0].step for request in engine.asked] == [step for step in range(1, 7) for _ in range(4)]
    for batch in batches:
        sampled = batch.facts_N.sampled_log_probs
        assert sampled is not None
        starts = [place for place, value in enumerate(sampled.tolist()) if value == -1]
        assert len(starts) == len(batch.row_ids)
        assert (sampled < 0).all()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("size", [0, 6])
@pytest.mark.parametrize("position", range(13))
def test_a_run_goes_on_as_if_it_had_not_stopped(every: int, size: int, position: int) -> None:
    replay = ReplaySettings(size=size)
    whole = loader(Echo(log_probs=True), every=every, replay=replay)
    expected = list(whole)
    first = loader(Echo(log_probs=True), every=every, replay=replay)
    taken = list(itertools.islice(first, position))
    assert len(taken) == position
    second_engine = Echo(log_probs=True)
    second = loader(second_engine, every=every, replay=replay)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(rest) == 12 - position
    for batch, other in zip(rest, expected[position:], strict=True):
        assert torch.equal(batch.input_ids, other.input_ids)
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.sampled_log_probs, other.sampled_log_probs)  # type: ignore[arg-type]
        assert (batch.step, batch.step_tokens) == (other.step, other.step_tokens)
    if every == 3 and position == 8:
        # Step 4 belongs to a round that had begun: nothing of it is asked for again.
        assert not second_engine.asked


class Mute(Echo):
    """Ends every response at once."""

    def answer(self, requests: Sequence[Request]) -> list[Response]:
        return [Response([99], True) for request in requests for _ in request.keys]


def test_responses_that_are_all_empty_are_said_and_still_trained(caplog: pytest.LogCaptureFixture) -> None:
    batches = list(loader(Mute()))
    assert "All 4 responses for optimiser step 0 are empty: the student ends at once." in caplog.text
    assert all(batch.labels_N.tolist() == [99] * len(batch.row_ids) for batch in batches)
    assert {batch.step_tokens for batch in batches} == {4}
