"""The one way to choose a device: where Lightning would train, also for commands that run no trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

#: What ``trainer.accelerator`` may be. Lightning 2.6 trains on all but ``xpu``: it has no accelerator of that name, so
#: XPUs serve the commands that run no trainer.
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "xpu")


def choose_device(
    accelerator: str = "auto", devices: Any = "auto", environ: Mapping[str, str] = os.environ
) -> torch.device:
    """Return the device of this process.

    ``auto`` is Lightning's choice: MPS, else CUDA, else the CPU; ``gpu`` is the same without the CPU. On a machine with
    several GPUs each process has its own, by its local rank.

    Args:
        accelerator: ``trainer.accelerator``, one of ACCELERATORS.
        devices: ``trainer.devices``: a list (or ``"2,3"``) names the GPUs of the local ranks; a number does not.
        environ: the environment, which says the local rank.

    Raises:
        ValueError: the accelerator is unknown, or this machine does not have it.
    """
    kind = _kind(accelerator)
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    count = torch.cuda.device_count() if kind == "cuda" else torch.xpu.device_count()
    rank, named = local_rank(environ), _named(devices)
    # Some launchers show each process its own GPU alone.
    return torch.device(kind, (named[rank % len(named)] if named else rank) % count)


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of this process on its machine, as Lightning, torchrun or SLURM set it."""
    return int(environ.get("LOCAL_RANK") or environ.get("SLURM_LOCALID") or 0)


def _kind(accelerator: str) -> str:
    """One of ``cpu``, ``cuda``, ``mps`` and ``xpu``, which is there."""
    if accelerator not in ACCELERATORS:
        raise ValueError(f"trainer.accelerator is {accelerator!r}; allowed: {', '.join(ACCELERATORS)}")
    there = {"mps": MPSAccelerator.is_available(), "cuda": CUDAAccelerator.is_available(), "cpu": True}
    # An XPU is taken only where it is asked for: "auto" means the device of the training, which can't be one.
    found = [kind for kind, is_there in there.items() if is_there] + (["xpu"] if torch.xpu.is_available() else [])
    wanted = {"auto": ("mps", "cuda", "cpu"), "gpu": ("mps", "cuda")}.get(accelerator, (accelerator,))
    chosen = next((kind for kind in wanted if kind in found), None)
    if chosen is None:
        raise ValueError(
            f"trainer.accelerator is {accelerator}, but this machine has no such device; it has {', '.join(found)}: "
            "give one of these, or auto"
        )
    return chosen


def _named(devices: Any) -> list[int]:
    if isinstance(devices, str) and "," in devices:
        return [int(part) for part in devices.split(",") if part.strip()]
    return [int(device) for device in devices] if isinstance(devices, list | tuple) else []
