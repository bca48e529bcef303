"""Orders of names."""

from __future__ import annotations

from deltakd.io.wording import natural


def test_numbers_in_names_are_sorted_as_numbers() -> None:
    names = ["run_10", "run_9", "v=1.5", "v=1.25", "v=1", "w=0.5,v=10", "w=0.25,v=9", "9"]
    assert sorted(names, key=natural) == ["9", "run_9", "run_10", "v=1", "v=1.25", "v=1.5", "w=0.25,v=9", "w=0.5,v=10"]
