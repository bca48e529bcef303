"""Progress on terminals of any width, in notebooks, in logs; no bar is wrapped, and no log holds a bar."""

from __future__ import annotations

import io
import logging
import re
import sys
import types

import pytest
from rich.console import Console

from deltakd.io import progress
from deltakd.io.progress import progress_bar

NOTE = "loss 12.3456  111,036 tokens/s"


def lines_of_bar(width: int, monkeypatch: pytest.MonkeyPatch, total: int = 100_000) -> list[str]:
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda: console)
    with progress_bar("a_long_name_of_a_run_of_mine", total, True) as advance:
        for done in (1, total // 2, total):
            advance(done, NOTE)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.parametrize("width", [80, 110, 200])
def test_a_bar_is_one_line_of_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of_bar(width, monkeypatch)
    assert all(len(line) <= width for line in lines)
    last = lines[-1]
    assert last.startswith("a_long_name_of_a_ru… ━━━━━━")
    assert "100000/100000" in last
    assert NOTE in last
    assert not any("0.00" in line for line in lines)


def test_what_is_logged_goes_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda: Console(file=output, width=80, force_terminal=True))
    handler = logging.StreamHandler(sys.stdout)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with progress_bar("run", 2, True) as advance:
            advance(1)
            root.warning("a warning in between")
        assert handler.stream is sys.stdout
    finally:
        root.removeHandler(handler)
    assert "a warning in between" in output.getvalue()


def test_where_there_is_no_terminal_a_line_is_logged_for_each_tenth(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "Console", lambda: Console(file=io.StringIO()))
    with progress_bar("kd", 300, True, done=100, unit="step") as advance:
        for done in range(101, 301):
            now[0] += 1
            advance(done, NOTE)
    assert len(caplog.messages) == 7
    assert caplog.messages[0] == "kd: step 120 of 300, loss 12.3456, 111,036 tokens/s, 0:03:09 left"
    assert caplog.messages[-1] == "kd: step 300 of 300, loss 12.3456, 111,036 tokens/s"


def test_what_is_done_in_seconds_logs_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "Console", lambda: Console(file=io.StringIO()))
    with progress_bar("answers", 10, True) as advance:
        for done in range(11):
            advance(done)
    assert not caplog.messages


def test_in_a_notebook_one_line_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def display(content: dict[str, str], **options: bool) -> types.SimpleNamespace:
        assert options == {"raw": True, "display_id": True}
        shown.append(content["text/plain"])
        return types.SimpleNamespace(update=lambda content, raw: shown.append(content["text/plain"]))

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr(progress, "Console", lambda: Console(force_jupyter=True))
    with progress_bar("kd", 4, True) as advance:
        advance(1, NOTE)
        advance(4, NOTE)
    assert shown[0] == "kd: 0/4"
    assert shown[-1].startswith("kd  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  4/4  0:00:00  loss 12.3456")
