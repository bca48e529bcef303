"""SIGTERM, SIGUSR1 and Ctrl-C: finish the optimiser step, save, leave."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from deltakd.distributed.sharding import gathered, on_any_rank
from deltakd.io.errors import Stopped
from deltakd.training.callbacks.checkpoints import Checkpoints
from deltakd.training.callbacks.steps import at_step_end

#: SLURM sends the last two before it ends a job: SIGUSR1 for #SBATCH --signal, SIGUSR2 for submitit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@final
class StopOnSignal(Checkpoint):
    """Turns SIGNALS into a saved checkpoint and :class:`Stopped`, at the end of the optimiser step.

    A SIGINT after another signal acts at once. It is a ``Checkpoint`` because Lightning runs those after all other
    callbacks, in the order given: it must come after :class:`Checkpoints`.

    Args:
        checkpoints: saves the state.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers, after Lightning's own, which would not wait for the end of the step."""
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals only to the main thread; such a program stops its threads by other means.
            return
        for signum in SIGNALS:
            self._previous[signum] = signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signum

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save and stop if a signal came, at the end of the optimiser step."""
        if not at_step_end(trainer):
            return
        # Saving is collective, and not every rank may have got the signal.
        if on_any_rank(self._received is not None):
            self.checkpoints.save_last(trainer)
            # All ranks exit with the same status, so that the launcher can interpret it.
            raise Stopped(max(signum for signum in gathered(self._received) if signum), trainer.global_step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the previous handlers."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers: after an error Lightning calls no ``teardown``, and a notebook continues."""
        self._restore()

    def _restore(self) -> None:
        """Give back those that are still ours.

        Before ``teardown`` Lightning has put back what was there before the run. Its own handlers, which we replaced,
        would keep the whole run in memory.
        """
        for signum, handler in self._previous.items():
            if signal.getsignal(signum) == self._receive:
                signal.signal(signum, handler)
        self._previous = {}
