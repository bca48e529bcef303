"""Callbacks that hurt the run they belong to: ``+callbacks.x={_target_: tests.distributed.faults.Signal, ...}``."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any, final

import lightning as L


@final
class Signal(L.Callback):
    """Sends a signal to its own process on some ranks, in the middle of a step: after the loss, before its gradient.

    Args:
        name: of the signal.
        ranks: who does it.
        step: optimiser steps done by then.
    """

    def __init__(self, name: str, ranks: list[int], step: int) -> None:
        self.name = name
        self.ranks = ranks
        self.step = step

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank in self.ranks:
            print(f"<{time.time()}>", flush=True)
            os.kill(os.getpid(), signal.Signals[self.name])


@final
class FullDisk(L.Callback):
    """Leaves no room for a checkpoint, but for small files.

    Args:
        ballast: a file that fills its disk; None: the system takes no larger files from the main process any more.
        step: after this many optimiser steps, before they are saved; None: after the last checkpoint.
    """

    ROOM = 40_000

    def __init__(self, ballast: str | None, step: int | None) -> None:
        self.ballast = ballast
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self._fill(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.step is None:
            self._fill(trainer)

    def _fill(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        if self.ballast is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.ROOM, resource.RLIM_INFINITY))
            return
        stat = os.statvfs(Path(self.ballast).parent)
        with open(self.ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - self.ROOM)
