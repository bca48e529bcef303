"""Jobs of a multirun that would train the same model twice."""

from __future__ import annotations

import pytest

from deltakd.studies.same_jobs import earlier_job, find_same_jobs, in_words, tell_jobs


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        # sft 0.5, sft 1, kd 0.5, kd 1, delta_kd 0.5, delta_kd 1
        (["loss=sft,kd,delta_kd", "delta_weight=0.5,1"], {1: 0, 3: 2}),
        (["delta_weight=0.5,1", "loss=sft,delta_kd"], {2: 0}),
        (["loss=kd", "seed=1,2"], {}),
        (["loss=kd", "optim.lr=1e-4,0.0001"], {1: 0}),
        (["loss=kd", "delta_weight=interval(0,1)"], {}),
        (["loss=kd", "seed=1"], {}),
        (["loss=delta_kd", "seed=range(0,300)"], {}),
    ],
)
def test_jobs_that_differ_in_nothing_they_read_are_one(overrides: list[str], same: dict[int, int]) -> None:
    assert find_same_jobs(overrides) == same


def test_jobs_in_other_processes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAKD_SAME_JOBS", "{}")
    tell_jobs({3: 1})
    assert [earlier_job(number) for number in (1, 3)] == [None, 1]
    assert in_words({3: 1}).startswith("1 of the jobs would train the same model as an earlier one")
