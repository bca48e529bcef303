"""Checks of ``reference=served``: a server runs the references."""

from __future__ import annotations

from contextlib import suppress

from deltakd.distributed.devices import choose_device
from deltakd.references.settings import ServedSettings
from deltakd.rollouts.settings import RolloutSettings
from deltakd.training.settings import TrainerSettings
from deltakd.types import Loss


def serving_problems(loss: Loss, rollout: RolloutSettings | None) -> list[str]:
    """Return what does not go with references that a server runs."""
    found = []
    if loss.needs_alignment:
        found.append(
            "reference=served sends the student's tokens, and the loss aligns them with those of another tokenizer; "
            "give reference=live or reference=cached, or a loss of one tokenizer"
        )
    if rollout is not None and rollout.mixes_teacher:
        found.append(
            "rollout.source=mixture runs the teacher token by token, and reference=served sends it whole rows; give "
            "reference=live, or rollout.source=student"
        )
    return found


def transport_problems(served: ServedSettings, trainer: TrainerSettings) -> list[str]:
    """Return why hidden states can't go the way that the config names on this machine, trainer's or server's."""
    found: list[str] = []
    # A device that is not there is named by another check.
    with suppress(ValueError):
        device = choose_device(trainer.accelerator, trainer.devices)
        if served.transport == "nccl" and device.type != "cuda":
            found.append(
                f"reference.transport=nccl moves hidden states between GPUs, and this process's device is {device}; "
                "give trainer.accelerator=gpu on machines with CUDA, or reference.transport=auto"
            )
    return found
