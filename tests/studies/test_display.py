"""The live table of a study's stages, with a clock of the test's own."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deltakd.evaluation.answers import progress_bar
from deltakd.io.errors import Stopped
from deltakd.io.progress import current_display
from deltakd.studies.display import StageTable, stages_on


def drawn(table: StageTable) -> dict[str, list[str]]:
    """Stage -> the words of its row."""
    output = io.StringIO()
    Console(file=output, width=120).print(table)
    lines = [line.split() for line in output.getvalue().splitlines()]
    return {words[0]: words[1:] for words in lines if words}


def test_state_steps_time_left_and_result() -> None:
    now = [0.0]
    table = StageTable("a study", {"first": 2, "second": None}, clock=lambda: now[0])
    assert drawn(table)["first"] == ["waiting", "~2"]
    table.start("first")
    now[0] = 30.0
    # A resumed training starts in the middle: its speed counts from there.
    table.progress("training", 100, 200, "loss 1.0")
    assert drawn(table)["first"] == ["training", "100/200", "0.5", "loss", "1.0"]
    now[0] = 40.0
    table.progress("training", 110, 200, "loss 0.9")
    assert drawn(table)["first"] == ["training", "110/200", "0:01:30", "0.7", "loss", "0.9"]
    table.progress("test seed 10", 0, 8)
    now[0] = 44.0
    table.progress("test seed 10", 2, 8)
    assert drawn(table)["first"] == ["test", "seed", "10", "2/8", "0:00:12", "0.7"]
    table.finish("first", "val/rougeL = 38", 60.0)
    assert drawn(table)["first"] == ["finished", "1.0", "val/rougeL", "=", "38"]
    table.start("second")
    now[0] = 50.0
    table.end("failed")
    assert drawn(table)["second"] == ["failed", "0.1"]


def test_a_stage_of_many_runs_is_one_line_until_it_begins_and_what_is_left_follows_the_first() -> None:
    now = [0.0]
    table = StageTable("a study", {"a/x=1": 2, "a/x=2": 2, "b": None}, clock=lambda: now[0])
    assert drawn(table)["a"] == ["(2", "runs)", "waiting", "~4"]
    assert table.__rich__().caption == "about 4 minutes left"
    table.start("a/x=1")
    now[0] = 60.0
    table.fail("a/x=1", "loss is not finite", 60.0)
    table.expect({"a/x=2": 1.0})
    assert drawn(table)["a/x=1"][:2] == ["failed", "1.0"]
    assert drawn(table)["a/x=2"] == ["waiting", "~1"]
    table.start("a/x=2")
    now[0] = 90.0
    assert table._minutes_left(now[0]) == 0.5
    for name in ("a/x=1", "a/x=2"):
        table.finish(name, "fine", 60.0)
    assert drawn(table)["a"] == ["(2", "runs)", "finished", "2.0"]


def test_bars_go_into_the_table_and_a_stop_is_shown() -> None:
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=True)
    with pytest.raises(Stopped):
        _stop_in_the_middle(console)
    last = output.getvalue().splitlines()[-3:]
    assert any("stopped" in line and "3/8" in line for line in last)
    assert current_display() is None


def _stop_in_the_middle(console: Console) -> None:
    with stages_on(console, "a study", {"first": 1.0}) as stages:
        stages.start("first")
        with progress_bar("answers", 8, shown=True) as advance:
            advance(3)
        raise Stopped(2, 5)


def test_plain_lines_where_there_is_no_terminal() -> None:
    output = io.StringIO()
    with stages_on(Console(file=output), "a study", {"first": 1.0, "second": 1.0}) as stages:
        assert current_display() is None
        stages.finish("first", "x", 1.0, before=True)
        stages.start("second")
        stages.finish("second", "val/loss = 2", 3.4)
    expected = ["[1/2] first: finished before", "[2/2] second ...", "[2/2] second: val/loss = 2, 3 s"]
    assert output.getvalue().splitlines() == expected
