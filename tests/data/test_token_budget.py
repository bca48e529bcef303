from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakd.data import InstructionData
from deltakd.data.batches.budget import TokenBudgetSampler, pack
from deltakd.data.batches.sampler import WINDOW_STEPS
from deltakd.io.run_directory import RunDirectory

LENGTHS = np.random.default_rng(0).lognormal(4, 0.8, 3003).astype(int).clip(2, 500)


def make(lengths: Any = LENGTHS, **changes: Any) -> TokenBudgetSampler:
    options: dict[str, Any] = {"max_tokens": 512, "accumulate": 2, "world_size": 1, "rank": 0, "seed": 3}
    options |= {"epochs": 2, "max_steps": None} | changes
    return TokenBudgetSampler(lengths, np.asarray(lengths) - 1, **options)


def steps(sampler: TokenBudgetSampler) -> list[list[int]]:
    return [sampler.rows_of_step(step).tolist() for step in range(sampler.total_steps)]


def test_micro_batches_fit_and_are_nearly_full() -> None:
    sampler = make()
    used = []
    for index in range(len(sampler)):
        rows = sampler.micro_batch(index).rows
        used.append(len(rows) * LENGTHS[rows].max())
    assert max(used) <= 512
    # Not full: beside a row of 300 tokens there is no room for another of its length.
    assert np.mean(used) > 0.85 * 512
    real = sum(LENGTHS[rows].sum() for rows in map(sampler.rows_of_step, range(sampler.total_steps)))
    assert 1 - real / sum(used) < 0.04


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    epochs=st.integers(1, 3),
    split=st.tuples(st.integers(1, 3), st.integers(1, 2)),
)
def test_every_row_once_an_epoch(lengths: list[int], epochs: int, split: tuple[int, int]) -> None:
    sampler = make(lengths, max_tokens=40, epochs=epochs, accumulate=split[0], world_size=split[1])
    taken = steps(sampler)
    ends = sampler.pass_ends
    for epoch, end in enumerate(ends[:epochs], start=1):
        counts = Counter(row for step in taken[:end] for row in step)
        assert min(counts[row] for row in range(len(lengths))) >= epoch
    assert ends[epochs - 1] == sampler.total_steps
    for step in taken:
        assert len(pack(np.asarray(lengths)[step], 40)) == split[0] * split[1]


def test_an_epoch_that_is_over_has_had_each_row_as_often_as_the_stream() -> None:
    sampler = make(epochs=3)
    taken, ends = steps(sampler), sampler.pass_ends
    for epoch in (1, 2, 3):
        counts = Counter(row for step in taken[: ends[epoch - 1]] for row in step)
        assert set(counts.values()) <= {epoch, epoch + 1}
        # The epoch's last window is filled up with rows of the next: with less than a step of them.
        assert sum(LENGTHS[row] for row, count in counts.items() if count > epoch) < 2 * 512


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 4), (2, 2)])
def test_steps_do_not_depend_on_the_split(accumulate: int, world_size: int) -> None:
    ranks = [make(accumulate=accumulate, world_size=world_size, rank=rank) for rank in range(world_size)]
    expected = make(accumulate=4)
    assert ranks[0].total_steps == expected.total_steps
    for step in (0, 7, 60, expected.total_steps - 1):
        micros = [rank.micro_batch(step * accumulate + a) for a in range(accumulate) for rank in ranks]
        rows = [micro.rows.tolist() for micro in micros]
        assert rows == [expected.micro_batch(step * 4 + number).rows.tolist() for number in range(4)]
        assert [row for part in rows for row in part] == expected.rows_of_step(step).tolist()
        tokens = sum(int((LENGTHS[micro.rows] - 1).sum()) for micro in micros)
        assert {(micro.step, micro.step_tokens) for micro in micros} == {(step, tokens)}


def test_ranks_get_similar_lengths_and_steps_mix_over_time() -> None:
    sampler = make(accumulate=4, epochs=1)
    longest = [
        [LENGTHS[sampler.micro_batch(4 * step + m).rows].max() for m in range(4)] for step in range(WINDOW_STEPS)
    ]
    assert np.mean([max(step) / min(step) for step in longest]) < 1.2
    assert abs(np.corrcoef([step[0] for step in longest], range(WINDOW_STEPS))[0, 1]) < 0.5


def test_random_access_equals_sequence() -> None:
    sequence = steps(make())
    jumping = make(epochs=None, max_steps=len(sequence))
    for step in np.random.default_rng(1).permutation(len(sequence)):
        assert jumping.rows_of_step(step).tolist() == sequence[step]
    assert steps(make()) == sequence != steps(make(seed=4))
    assert steps(make(epochs=None, max_steps=40)) == sequence[:40]


def test_numbers_of_steps() -> None:
    one, two = make(epochs=1).total_steps, make(epochs=2).total_steps
    assert make(epochs=1).steps_per_epoch == one
    assert make(epochs=2).pass_ends == [one, two]
    assert make(epochs=1.5).total_steps == one + -(-(two - one) // 2)
    assert make(epochs=0.25).total_steps == -(-one // 4)
    assert make(epochs=0.25).pass_ends == []
    assert make(epochs=2, max_steps=10).total_steps == make(epochs=-1, max_steps=10).total_steps == 10
    assert len(make(epochs=None, max_steps=10)) == 20
    assert [make().epoch_of_step(step) for step in (0, one - 1, one, two - 1)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 400}, r"max_tokens_per_batch is 400, but training row \d+ has 500 tokens; give 500 or more"),
        ({"max_tokens": 0}, "max_tokens = 0; it must be at least 1"),
        ({"epochs": None}, "neither epochs nor max_steps is given"),
        ({"lengths": []}, "0 lengths and 0 counts"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_no_step_beyond_the_run() -> None:
    with pytest.raises(IndexError, match="step 10 of a run of 10"):
        make(max_steps=10).rows_of_step(10)


def test_exactly_one_size_of_a_batch() -> None:
    def problems(batch_size: int | None, max_tokens: int | None) -> list[str]:
        data = InstructionData(train=__file__, batch_size=batch_size, max_tokens_per_batch=max_tokens)
        return data.problems()

    assert problems(8, None) == problems(None, 4096) == []
    assert "are both null; give one of them" in problems(None, None)[0]
    assert "are both given; give one of them" in problems(8, 4096)[0]


def test_a_row_beyond_the_budget_is_found_before_a_model_is_loaded(
    train: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltakd.training.assembly.open_models", lambda *_: pytest.fail("models were loaded"))
    with pytest.raises(ValueError, match=r"data.max_tokens_per_batch is 20, but training row \d+ has \d+ tokens"):
        train("sft", "data.batch_size=null", "data.max_tokens_per_batch=20")


@pytest.mark.parametrize("rows", [1, 20, 300])
def test_rows_that_the_first_pass_takes_of_the_next(rows: int) -> None:
    sampler = make(LENGTHS[:rows], epochs=1)
    assert sampler.borrowed_rows == sum(map(len, steps(sampler))) - rows
    assert make(LENGTHS[:300], epochs=None, max_steps=1).borrowed_rows == 0
