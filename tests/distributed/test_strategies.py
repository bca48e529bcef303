"""What is known of a run's processes before Lightning makes them."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest

from deltakd.distributed.strategies import check_ranks, count_ranks


def make_trainer(devices: Any, num_nodes: int) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=num_nodes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.parametrize(("devices", "num_nodes"), [(1, 1), (2, 1), ("3", 1), ("auto", 1), (2, 4), ("auto", 2)])
def test_ranks_are_counted_as_lightning_counts_them(devices: Any, num_nodes: int) -> None:
    trainer = make_trainer(devices, num_nodes)
    ranks = count_ranks("cpu", devices, num_nodes)
    assert ranks == trainer.world_size
    check_ranks(trainer, ranks)


def test_a_launcher_knows_how_many_processes_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert count_ranks("auto", "auto", 2) == 8


def test_all_gpus_of_a_machine_are_counted_unless_the_accelerator_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.accelerators.CUDAAccelerator.is_available", lambda: True)
    monkeypatch.setattr("lightning.pytorch.accelerators.CUDAAccelerator.auto_device_count", lambda: 4)
    assert [count_ranks(accelerator, -1, 2) for accelerator in ("auto", "gpu", "cuda", "cpu")] == [8, 8, 8, 2]


def test_a_trainer_with_other_processes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"makes 1 processes of this run, but .* were taken for 2; give trainer.devic"):
        check_ranks(make_trainer(1, 1), 2)
