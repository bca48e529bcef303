"""Lets the ranks of a training run watch each other, from the moment they are joined to the end of the run."""

from __future__ import annotations

import logging
import os
import secrets
from types import TracebackType
from typing import final

import lightning as L

from deltakd.distributed.lifeline import Hub, Line, Process, listen
from deltakd.distributed.sharding import gathered, place

log = logging.getLogger(__name__)


@final
class Lifeline(L.Callback):
    """Ends all ranks when one of them dies or fails, with a message that names it.

    A context manager around everything the ranks do together; as a callback it learns when the ranks are joined. A
    single process needs no lifeline and gets none.

    Args:
        how_to_resume: how a user resumes from the last checkpoint.
    """

    def __init__(self, how_to_resume: str) -> None:
        self.how_to_resume = how_to_resume
        self._line: Line | None = None
        self._trainer: L.Trainer | None = None

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._fail(error)
        if self._line is not None:
            self._line.close()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Connect all ranks; if one can't reach rank 0, continue without a lifeline and warn."""
        rank, world_size = place()
        if world_size == 1 or self._line is not None:
            return
        self._trainer = trainer
        # Set by the creator of the process group.
        address = os.environ["MASTER_ADDR"]
        listener = listen(address, world_size) if rank == 0 else None
        port = listener.getsockname()[1] if listener else 0
        everybody = gathered((Process.this(rank), port, secrets.token_hex(16)))
        processes = [process for process, _, _ in everybody]
        _, port, token = everybody[0]
        if listener:
            Hub(listener, token, processes).start()
        try:
            line, problem = Line(address, port, token, rank, processes, self._epilogue), ""
        except OSError as error:
            line, problem = None, f"rank {rank}: {error}"
        problems = list(filter(None, gathered(problem)))
        if line and not problems:
            self._line = line
            line.start()
        elif line:
            line.close()
        if problems and rank == 0:
            log.warning("A rank that dies will not be named, since not all of them reach rank 0 (%s).", problems[0])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tell the others at once, before anything is torn down."""
        self._fail(exception)

    def _fail(self, error: BaseException) -> None:
        if self._line is not None:
            self._line.fail((str(error).splitlines() or [""])[0] or type(error).__name__)

    def _epilogue(self) -> str:
        step = 0 if self._trainer is None else self._trainer.global_step
        return f"this was after {step} optimiser steps. To continue from the last checkpoint: {self.how_to_resume}"
