"""CI runs as many slow tests as there is time for, and says which it did not reach."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / ".ci" / "slow_tests.py"

TESTS = """
import time

def test_quick():
    pass

def test_endless():
    time.sleep(60)

def test_later():
    pass

def test_wrong():
    assert 1 + 1 == 3
"""


def run(folder: Path, seconds: float, *names: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_some.py").write_text(TESTS)
    command = [sys.executable, str(SCRIPT), "--seconds", str(seconds), *(f"test_some.py::{name}" for name in names)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=50)


def test_out_of_time_the_rest_is_named_in_the_last_line(tmp_path: Path) -> None:
    started = time.monotonic()
    done = run(tmp_path, 5.0, "test_quick", "test_endless", "test_later")
    assert time.monotonic() - started < 30
    assert done.returncode == 0, done.stdout
    *_, closing, last = done.stdout.splitlines()
    assert "1 passed, 1 skipped" in closing
    assert last == (
        "out of time, 2 of the slow tests were not reached: test_some.py::test_endless (interrupted), "
        "test_some.py::test_later"
    )


def test_a_failure_fails_it_and_shows_pytests_closing_lines(tmp_path: Path) -> None:
    done = run(tmp_path, 30.0, "test_quick", "test_wrong", "test_later")
    assert done.returncode == 1
    assert "FAILED test_some.py::test_wrong" in done.stdout
    assert "1 failed, 2 passed" in done.stdout.splitlines()[-1]
    assert run(tmp_path, 30.0, "test_renamed").returncode != 0


def test_the_listed_tests_exist_and_need_at_most_25_minutes() -> None:
    spec = importlib.util.spec_from_file_location("slow_tests", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    listed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(listed)
    assert listed.TESTS
    assert sum(seconds for seconds, _ in listed.TESTS) <= 25 * 60
    for _, test in listed.TESTS:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), test
