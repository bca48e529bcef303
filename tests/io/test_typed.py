"""Values against annotations: what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Len, Lt

from deltakd.io.typed import allowed, mismatch, mismatches, typed


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (bool, [True, False], ["no", "off", "false", 0, 1, None]),
        (int, [0, -3], [True, 1.0, "1", None]),
        (float, [0, 1, 0.5], [True, "1e-5", float("nan"), float("inf"), None]),
        (str, ["", "123"], [123, None, True]),
        (int | None, [1, None], [0.5, "null"]),
        (Literal["cut", "drop"], ["cut"], ["Cut", None, 1]),
        (Annotated[int, Ge(1)], [1], [0, 1.5]),
        (Annotated[float, Gt(0), Lt(1)], [0.5], [0, 1, "0.5"]),
        (str | Sequence[str], ["a", ["a", "b"]], [5, ["a", 5], {"a": "b"}]),
        (Annotated[Sequence[float], Len(2, 2)], [[0.9, 0.99]], [[0.9], 0.9, "0.9"]),
        (Mapping[str, str], [{}, {"a": "b"}], [{"a": 1}, [], "a"]),
    ],
)
def test_only_values_of_the_annotated_type_pass(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if mismatch(hint, value, "key")] == []
    assert [value for value in bad if not mismatch(hint, value, "key")] == []


def test_a_mismatch_says_the_key_the_value_and_what_is_allowed() -> None:
    assert mismatch(bool, "no", "resume") == ["resume is 'no'; it must be true or false"]
    assert mismatch(Annotated[int, Ge(1)] | None, 100.0, "data.limit") == [
        "data.limit is 100.0; it must be a whole number from 1 or null; write 100"
    ]
    assert mismatch(str | None, 2026, "run_dir") == [
        "run_dir is 2026; it must be text or null; to give these digits as text: \"run_dir='2026'\""
    ]
    assert allowed(Annotated[float, Gt(0), Lt(1)]) == "a finite number above 0 and below 1"
    assert allowed(Literal["cut", "drop"] | None) == "cut, drop or null"


@dataclass(frozen=True)
class Inner:
    """A group within a group."""

    rows: Annotated[int, Ge(0)] = 3


@dataclass(frozen=True)
class Outer:
    """A group."""

    path: str
    inner: Inner = field(default_factory=Inner)
    steps: int | None = None


def test_wrong_values_are_left_out_and_everything_wrong_is_told() -> None:
    problems: list[str] = []
    made = typed(Outer, {"path": "x", "steps": "many", "inner": {"rows": -1, "row": 2}}, "group", problems)
    assert made == Outer("x")
    assert problems == [
        "group.steps is 'many'; it must be a whole number or null",
        "group.inner has no key 'row'; allowed: rows",
        "group.inner.rows is -1; it must be a whole number from 0",
    ]


def test_without_a_required_value_there_is_nothing() -> None:
    problems: list[str] = []
    assert typed(Outer, {"path": 5}, "group", problems) is None
    assert typed(Outer, {}, "group", problems) is None
    assert typed(Outer, "x", "group", problems) is None
    assert [problem.partition(";")[0] for problem in problems] == [
        "group.path is 5",
        "group.path is missing",
        "group is 'x'",
    ]


def test_what_code_has_made_is_checked_by_the_same_annotations() -> None:
    assert mismatches(Inner(2), "inner") == []
    assert mismatches(Inner(-2), "inner") == ["inner.rows is -2; it must be a whole number from 0"]
