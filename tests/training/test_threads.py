"""CPU threads of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from deltakd.training.settings import TrainerSettings
from deltakd.training.threads import TINY, choose_threads, threads_kept


@pytest.fixture(autouse=True)
def _four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with threads_kept():
        torch.set_num_threads(4)
        yield


def sized(parameters: int) -> nn.Module:
    return nn.Linear(parameters, 1, bias=False, device="meta")


@pytest.mark.parametrize(("sizes", "threads"), [([1000], 1), ([TINY - 1], 1), ([TINY // 2, TINY // 2], 4), ([TINY], 4)])
def test_tiny_models_take_one_thread(sizes: list[int], threads: int) -> None:
    assert choose_threads(TrainerSettings(accelerator="cpu"), map(sized, sizes)) == threads
    assert torch.get_num_threads() == threads


def test_what_is_set_counts_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_threads(TrainerSettings(accelerator="cpu", threads=3), [sized(10)]) == 3
    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (3, "3")
    assert choose_threads(TrainerSettings(accelerator="cpu"), [sized(10)]) == 3


def test_the_choice_is_logged_with_the_way_to_another(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        choose_threads(TrainerSettings(accelerator="cpu"), [sized(2_500_000)])
    assert caplog.messages == [
        "One CPU thread: the models have 2.5 million parameters together, too few for more. trainer.threads=4 takes "
        "every core."
    ]


def test_a_notebook_gets_its_threads_back() -> None:
    with threads_kept():
        choose_threads(TrainerSettings(accelerator="cpu"), [sized(10)])
    assert torch.get_num_threads() == 4
    assert "OMP_NUM_THREADS" not in os.environ
