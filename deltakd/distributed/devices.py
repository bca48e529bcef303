"""The single place that chooses a device: the one on which Lightning would train, even without a trainer."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

#: Values of ``trainer.accelerator``. Lightning 2.6 has no accelerator ``xpu``, so XPUs serve only commands without a
#: trainer.
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "xpu")


def choose_device(
    accelerator: str = "auto", devices: Any = "auto", environ: Mapping[str, str] = os.environ
) -> torch.device:
    """Return the device of this process.

    ``auto`` is Lightning's choice: MPS, else CUDA, else the CPU; ``gpu`` is the same without the CPU. With several GPUs
    each process has its own, by local rank.

    Args:
        accelerator: ``trainer.accelerator``, one of ACCELERATORS.
        devices: ``trainer.devices``: a list (or ``"2,3"``) names the GPUs of the local ranks; a number does not.
        environ: the environment, which holds the local rank.

    Raises:
        ValueError: the accelerator is unknown, or this machine does not have it.
    """
    kind = _kind(accelerator)
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    count = torch.cuda.device_count() if kind == "cuda" else torch.xpu.device_count()
    rank, named = local_rank(environ), _named(devices)
    # Modulo the count: some launchers show each process only its own GPU.
    return torch.device(kind, (named[rank % len(named)] if named else rank) % count)


def training_problems(accelerator: str) -> list[str]:
    """Return why Lightning can't train on ``trainer.accelerator`` here, one sentence each."""
    if accelerator == "xpu":
        return [
            "trainer.accelerator is xpu, but Lightning 2.6 can't train on XPUs; give auto, cpu, gpu, "
            "cuda or mps (deltakd.evaluate, cache and generate do run on an XPU)"
        ]
    try:
        choose_device(accelerator)
    except ValueError as error:
        return [str(error)]
    return []


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return the rank of this process on its machine, as Lightning, torchrun or SLURM set it."""
    return int(environ.get("LOCAL_RANK") or environ.get("SLURM_LOCALID") or 0)


def _kind(accelerator: str) -> str:
    """Return ``cpu``, ``cuda``, ``mps`` or ``xpu``, whichever is chosen and available."""
    if accelerator not in ACCELERATORS:
        raise ValueError(f"trainer.accelerator is {accelerator!r}; allowed: {', '.join(ACCELERATORS)}")
    there = {"mps": _has_mps(), "cuda": torch.cuda.device_count() > 0, "cpu": True}
    # Only "xpu" itself chooses an XPU: "auto" is the device of training, and Lightning can't train on one.
    found = [kind for kind, is_there in there.items() if is_there] + (["xpu"] if torch.xpu.is_available() else [])
    wanted = {"auto": ("mps", "cuda", "cpu"), "gpu": ("mps", "cuda")}.get(accelerator, (accelerator,))
    chosen = next((kind for kind in wanted if kind in found), None)
    if chosen is None:
        raise ValueError(
            f"trainer.accelerator is {accelerator}, but this machine has no such device; it has {', '.join(found)}: "
            "give one of these, or auto"
        )
    return chosen


def _has_mps() -> bool:
    """Return the same as Lightning's MPSAccelerator; config checks avoid importing Lightning, which takes seconds."""
    switched_off = os.environ.get("DISABLE_MPS", "0") == "1"
    return not switched_off and torch.backends.mps.is_available() and platform.processor() in ("arm", "arm64")


def _named(devices: Any) -> list[int]:
    if isinstance(devices, str) and "," in devices:
        return [int(part) for part in devices.split(",") if part.strip()]
    return [int(device) for device in devices] if isinstance(devices, list | tuple) else []
