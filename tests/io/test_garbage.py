"""What an ended run held is free before the next one begins."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltakd.io.garbage import nothing_left
from deltakd.studies.multirun import Job, run_job


class Model:
    """Refers to itself, as module and trainer do to each other."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _no_chance() -> Iterator[None]:
    """Python's own search for cycles must not come first by chance."""
    gc.disable()
    yield
    gc.enable()


def test_what_refers_to_itself_is_freed() -> None:
    frozen = gc.get_freeze_count()
    with nothing_left():
        gone = weakref.ref(Model())
        assert gone() is not None
    assert gone() is None
    assert gc.get_freeze_count() == frozen == 0


def test_it_is_freed_if_the_run_fails() -> None:
    held: list[weakref.ref[Model]] = []

    def run() -> None:
        held.append(weakref.ref(Model()))
        raise RuntimeError("no memory is left")

    with pytest.raises(RuntimeError, match="no memory"), nothing_left():
        run()
    assert held[0]() is None


def test_what_the_traceback_of_a_failed_run_held_is_freed_when_the_next_one_begins() -> None:
    held: list[weakref.ref[Model]] = []

    def run() -> None:
        model = Model()
        held.append(weakref.ref(model))
        raise RuntimeError("no memory is left")

    try:
        with nothing_left():
            run()
    except RuntimeError:
        assert held[0]() is not None
    with nothing_left():
        assert held[0]() is None


def test_a_job_of_a_multirun_leaves_nothing(tmp_path: Path) -> None:
    held: list[weakref.ref[Model]] = []

    def train() -> float:
        held.append(weakref.ref(Model()))
        return 1.0

    assert run_job(Job(0, tmp_path, ["loss=kd"], tmp_path / "0"), train) == 1.0
    assert held[0]() is None
