"""CPU threads of a run: PyTorch's default of one thread per core makes tiny models slower, not faster."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from deltakd.distributed.devices import choose_device
from deltakd.training.settings import TrainerSettings

log = logging.getLogger(__name__)

#: Below this many parameters, over all models of a run, one thread is used. Threads synchronise after every operation.
#: Below this size, that takes about as long as the operation, and if another program keeps a core busy, all threads
#: wait for the slowest: on a busy machine, two threads took 14 times the CPU time of one for a step of 0.4 million
#: parameters, and 5 times for 15 million.
TINY = 20_000_000

_VARIABLE = "OMP_NUM_THREADS"


@contextmanager
def threads_kept() -> Iterator[None]:
    """Restore the number of threads afterwards: a notebook continues after a run."""
    threads, variable = torch.get_num_threads(), os.environ.get(_VARIABLE)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if variable is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = variable


def choose_threads(settings: TrainerSettings, models: Iterable[nn.Module]) -> int:
    """Set the number of CPU threads of this process and return it.

    ``trainer.threads`` takes precedence, then OMP_NUM_THREADS, which Lightning sets to a rank's share of the cores.
    Without either, a run of tiny models on the CPU uses one thread.

    Args:
        settings: of the run.
        models: all models of the run.
    """
    if settings.threads is not None:
        return _set(settings.threads)
    if _VARIABLE in os.environ or torch.get_num_threads() == 1:
        return torch.get_num_threads()
    size = sum(parameter.numel() for model in models for parameter in model.parameters())
    if size >= TINY or choose_device(settings.accelerator, settings.devices).type != "cpu":
        return torch.get_num_threads()
    log.info(
        "One CPU thread: the models have %.1f million parameters together, too few for more. trainer.threads=%d takes "
        "every core.",
        size / 1e6,
        torch.get_num_threads(),
    )
    return _set(1)


def _set(threads: int) -> int:
    torch.set_num_threads(threads)
    # Lightning sets the number again when it starts several ranks, unless it is given here.
    os.environ[_VARIABLE] = str(threads)
    return threads
