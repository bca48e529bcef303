"""One rank works for all: the others wait without hanging, and all learn of a failure."""

from __future__ import annotations

import os
import time

import pytest
import torch.distributed as dist

from deltakd.distributed import one_rank
from deltakd.distributed.one_rank import by_rank_zero
from deltakd.io.errors import LostServerError, RefusedError, ServerError
from tests.distributed.processes import on_ranks


def _join() -> int:
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    return rank


def _answered() -> tuple[str, int, bool]:
    rank = _join()
    one_rank.BEAT_SECONDS = 0.05
    beats = 0
    original = one_rank._broadcast

    def counted(message: object) -> object:
        nonlocal beats
        beats += 1
        return original(message)  # type: ignore[arg-type]

    one_rank._broadcast = counted  # type: ignore[assignment]

    def work() -> tuple[str, int]:
        time.sleep(0.3)
        return "done", rank

    said, worker = by_rank_zero(work)
    return said, worker, beats > 2


def test_every_rank_gets_what_rank_zero_found_and_hears_from_it_meanwhile() -> None:
    assert on_ranks(2, _answered) == [("done", 0, True)] * 2


def _failed(error: Exception) -> list[str]:
    _join()
    found = []
    for _ in range(2):

        def work() -> None:
            raise error

        try:
            by_rank_zero(work)
        except ServerError as raised:
            found.append(f"{type(raised).__name__}: {raised}")
    return found


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [(LostServerError("gone"), "LostServerError: gone"), (RefusedError("no", 400), "ServerError: no")],
)
def test_a_failure_is_raised_on_every_rank(error: Exception, elsewhere: str) -> None:
    own, other = on_ranks(2, _failed, error)
    assert own == [f"{type(error).__name__}: {error}"] * 2
    assert other == [elsewhere] * 2


def test_a_process_alone_just_works() -> None:
    assert by_rank_zero(lambda: 3) == 3
