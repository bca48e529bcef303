"""The device of a command is the one that Lightning's trainer would take."""

from __future__ import annotations

import platform
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.accelerators import CUDAAccelerator, MPSAccelerator

from deltakd.distributed.devices import choose_device, training_problems


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with this many GPUs of each kind, as torch would see it."""
    monkeypatch.delenv("DISABLE_MPS", raising=False)

    def there(cuda: int = 0, mps: bool = False, xpu: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.xpu, "device_count", lambda: xpu)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu > 0)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(platform, "processor", lambda: "arm" if mps else "x86_64")

    return there


@pytest.mark.parametrize(
    ("there", "accelerator", "expected"),
    [
        ({}, "auto", "cpu"),
        ({"cuda": 2}, "auto", "cuda:0"),
        ({"cuda": 2}, "cpu", "cpu"),
        ({"cuda": 2}, "gpu", "cuda:0"),
        ({"mps": True}, "auto", "mps"),
        ({"mps": True}, "gpu", "mps"),
        ({"mps": True}, "cpu", "cpu"),
        # Lightning can't train on an XPU, so it is taken only where it is named.
        ({"xpu": 1}, "auto", "cpu"),
        ({"xpu": 1}, "xpu", "xpu:0"),
    ],
)
def test_the_accelerator_decides(machine: Any, there: dict[str, Any], accelerator: str, expected: str) -> None:
    machine(**there)
    assert str(choose_device(accelerator, environ={})) == expected


@pytest.mark.parametrize(("devices", "rank", "expected"), [(4, 2, 2), ("auto", 1, 1), ([3, 1], 1, 1), ("3,2", 0, 3)])
@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_each_process_has_a_gpu_of_its_own(machine: Any, devices: Any, rank: int, expected: int, variable: str) -> None:
    machine(cuda=4)
    assert choose_device("auto", devices, {variable: str(rank)}) == torch.device("cuda", expected)
    # A launcher that shows each process one GPU alone calls it 0.
    machine(cuda=1)
    assert choose_device("cuda", "auto", {variable: str(rank)}) == torch.device("cuda", 0)


def test_what_is_not_there_is_said(machine: Any) -> None:
    machine()
    for accelerator in ("gpu", "cuda", "mps", "xpu"):
        with pytest.raises(ValueError, match=rf"accelerator is {accelerator}, but .* it has cpu: give one of these"):
            choose_device(accelerator)
    assert training_problems("auto") == training_problems("cpu") == []
    assert "it has cpu: give one of these" in training_problems("mps")[0]
    machine(xpu=1)
    assert "Lightning 2.6 can't train on XPUs" in training_problems("xpu")[0]
    with pytest.raises(ValueError, match="is 'tpu'; allowed: auto, cpu, gpu, cuda, mps, xpu"):
        choose_device("tpu")


@pytest.mark.parametrize("there", [{}, {"cuda": 2}, {"mps": True}])
@pytest.mark.parametrize("disabled", [None, "0", "1"])
@pytest.mark.parametrize("processor", [None, "arm64", "i386"])
def test_lightning_finds_the_same_devices(
    machine: Any, monkeypatch: pytest.MonkeyPatch, there: dict[str, Any], disabled: str | None, processor: str | None
) -> None:
    machine(**there)
    if disabled is not None:
        monkeypatch.setenv("DISABLE_MPS", disabled)
    if processor is not None:
        monkeypatch.setattr(platform, "processor", lambda: processor)
    assert (training_problems("cuda") == []) == CUDAAccelerator.is_available()
    # Lightning asks once in a process; behind its cache is the question itself.
    assert (training_problems("mps") == []) == MPSAccelerator.is_available.__wrapped__()


@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_lightning_trains_there_on_this_machine(accelerator: str) -> None:
    trainer = L.Trainer(accelerator=accelerator, devices=1, logger=False, enable_progress_bar=False)
    assert trainer.strategy.root_device.type == choose_device(accelerator).type
