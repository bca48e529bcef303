from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from deltakd.data.batches.sampler import WINDOW_STEPS, StepSampler

LENGTHS = np.random.default_rng(0).lognormal(4, 0.8, 1003).astype(int) + 2


def make(lengths: Any = LENGTHS, **changes: Any) -> StepSampler:
    options: dict[str, Any] = {"batch_size": 4, "accumulate": 2, "world_size": 1, "rank": 0, "seed": 3}
    options |= {"epochs": 2, "max_steps": None} | changes
    return StepSampler(lengths, np.asarray(lengths) - 1, **options)


def steps(sampler: StepSampler) -> list[list[int]]:
    return [sampler.rows_of_step(step).tolist() for step in range(sampler.total_steps)]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("rows", "epochs"), [(1003, 3), (64, 2), (5, 4), (1, 3), (17, 2)])
def test_every_row_once_an_epoch(rows: int, epochs: int, grouped: bool) -> None:
    sampler = make(LENGTHS[:rows], epochs=epochs, group_by_length=grouped)
    taken = steps(sampler)
    assert len(taken) == -(-epochs * rows // 8)
    assert {len(step) for step in taken} == {8}
    counts = Counter(row for step in taken for row in step)
    # The last step is filled from the next epoch, so some rows come once more than there are epochs.
    assert set(counts.values()) <= {epochs + extra for extra in range(8 // rows + 2)}
    assert min(counts.values()) >= epochs
    assert len(counts) == rows


def test_whole_epochs_that_fit_are_exact() -> None:
    taken = steps(make(LENGTHS[:1000], epochs=2))
    for epoch in (taken[:125], taken[125:]):
        assert sorted(row for step in epoch for row in step) == list(range(1000))


@pytest.mark.parametrize(("batch_size", "accumulate", "world_size"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)])
def test_steps_do_not_depend_on_the_split(batch_size: int, accumulate: int, world_size: int) -> None:
    split = {"batch_size": batch_size, "accumulate": accumulate, "world_size": world_size}
    ranks = [make(**split, rank=rank) for rank in range(world_size)]
    expected = make()
    assert ranks[0].total_steps == expected.total_steps
    for step in (0, 7, 125, expected.total_steps - 1):
        micros = [rank.micro_batch(step * accumulate + a) for a in range(accumulate) for rank in ranks]
        assert np.concatenate([micro.rows for micro in micros]).tolist() == expected.rows_of_step(step).tolist()
        assert {micro.step for micro in micros} == {step}
        tokens = sum(int((LENGTHS[micro.rows] - 1).sum()) for micro in micros)
        assert {micro.step_tokens for micro in micros} == {tokens}


def test_random_access_equals_sequence() -> None:
    sequence = steps(make())
    jumping = make()
    for step in np.random.default_rng(1).permutation(len(sequence)):
        assert jumping.rows_of_step(step).tolist() == sequence[step]


def test_seeds_differ_and_repeat() -> None:
    assert steps(make()) == steps(make())
    assert steps(make()) != steps(make(seed=4))
    assert steps(make())[:125] != steps(make())[125:250]


def test_a_longer_run_begins_with_the_shorter() -> None:
    assert steps(make(epochs=None, max_steps=40)) == steps(make())[:40]


def test_grouping_spares_padding_and_mixes_lengths_over_time() -> None:
    def padding(sampler: StepSampler) -> float:
        slots = real = 0
        for index in range(len(sampler)):
            lengths = LENGTHS[sampler.micro_batch(index).rows]
            slots += lengths.max() * len(lengths)
            real += lengths.sum()
        return 1 - real / slots

    options = {"batch_size": 8, "accumulate": 1, "epochs": 1}
    grouped, plain = padding(make(**options)), padding(make(**options, group_by_length=False))
    assert grouped < 0.4 * plain
    means = [LENGTHS[rows].mean() for rows in steps(make(epochs=1))[:WINDOW_STEPS]]
    assert abs(np.corrcoef(means, range(WINDOW_STEPS))[0, 1]) < 0.5


def test_numbers_of_steps() -> None:
    assert make(LENGTHS[:30], epochs=0.1, batch_size=1, accumulate=1).total_steps == 3
    assert make(LENGTHS[:30], epochs=1.5).total_steps == 6
    assert make(epochs=3, max_steps=10).total_steps == 10
    assert make(epochs=None, max_steps=10).total_steps == 10
    assert make(epochs=-1, max_steps=10).total_steps == 10
    assert len(make(epochs=None, max_steps=10)) == 20
    assert make(LENGTHS[:20]).steps_per_epoch == 2.5
    assert [make(LENGTHS[:20]).epoch_of_step(step) for step in range(5)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": None}, "neither epochs nor max_steps is given"),
        ({"max_steps": 0}, "max_steps = 0; it must be above 0"),
        ({"batch_size": 0}, "batch_size = 0; it must be at least 1"),
        ({"rank": 1}, "rank = 1; it must be from 0 to world_size - 1 = 0"),
        ({"lengths": []}, "0 lengths and 0 counts"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_no_step_beyond_the_run() -> None:
    with pytest.raises(IndexError, match="step 251 of a run of 251"):
        make().rows_of_step(251)


@pytest.mark.parametrize(
    ("rows", "changes", "borrowed"),
    [
        (1000, {}, 0),
        (1003, {}, 5),
        (10, {}, 6),
        (10, {"accumulate": 8}, 22),
        (10, {"epochs": None, "max_steps": 1}, 0),
        (10, {"epochs": None, "max_steps": 2}, 6),
    ],
)
def test_rows_that_the_first_pass_takes_of_the_next(rows: int, changes: dict[str, Any], borrowed: int) -> None:
    assert make(LENGTHS[:rows], **changes).borrowed_rows == borrowed
