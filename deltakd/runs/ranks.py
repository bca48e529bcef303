"""Which process this is, and joint acts of all ranks, before any trainer exists.

Lightning's own launcher starts the other ranks once rank 0 is ready to train. torchrun and SLURM start all of them at
once: they would make the same files at the same time, and wait for each other in vain where one has refused to go on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.distributed.rendezvous import rendezvous

from deltakd.runs.launchers import Launch, read_launch

#: How long the last of all ranks may take to start after the first, as in torch's own process groups.
START_TIMEOUT = timedelta(minutes=30)
#: Seconds between two looks at what the other ranks have said.
POLL_SECONDS = 0.1

_DONE, _FAILED = b"done", b"failed"


def is_main_process() -> bool:
    """Whether this process is the one that writes: rank 0, from what the launcher left in the environment."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def external_launch() -> Launch | None:
    """Who started all ranks of this run; None where it is one process, or Lightning starts the others."""
    launch = read_launch(os.environ)
    return launch if launch is not None and launch.world_size > 1 and not launch.problem else None


def launch_id() -> str | None:
    """A name for this job that all its ranks share, and later starts of it; None where it has none."""
    launch = read_launch(os.environ)
    return None if launch is None else launch.id


def is_restarted() -> bool:
    """Whether a launcher starts this job again by itself: requeued by SLURM, or restarted by torchrun."""
    launch = read_launch(os.environ)
    return launch is not None and launch.restarted


@contextmanager
def main_process_first(what: str) -> Iterator[None]:
    """Rank 0 goes through the block before the others do; nobody goes on until all have.

    Where Lightning starts the other ranks there is nothing to do.

    Args:
        what: a name of the block, the same on all ranks, and used once in a process.

    Raises:
        SystemExit: with status 2, where another rank did not get through.
    """
    launch = external_launch()
    if launch is None:
        yield
        return
    store = _store(launch)
    if launch.rank > 0:
        _await(store, what, 0)
    state = _FAILED
    try:
        yield
        state = _DONE
    finally:
        store.set(_key(what, launch.rank), state)
    for rank in range(launch.world_size):
        _await(store, what, rank)


def agreed(what: str, value: str) -> str:
    """Rank 0's value, on all ranks.

    Args:
        what: a name of the value, the same on all ranks, and used once in a process.
        value: this rank's own.
    """
    launch = external_launch()
    if launch is None:
        return value
    store = _store(launch)
    if launch.rank == 0:
        store.set(_key(what, 0), value)
    return _read(store, what, 0).decode()


@lru_cache(maxsize=1)
def _store(launch: Launch) -> Any:
    """The store over which the process group will be joined later: torchrun's, or one that rank 0 serves.

    As many as want to can use it at the same address in a process, Lightning among them.
    """
    if launch.name == "SLURM":
        environment = SLURMEnvironment(auto_requeue=False)
        # Asked for, they are put into the environment.
        assert environment.main_address
        assert environment.main_port
    url = f"env://?rank={launch.rank}&world_size={launch.world_size}"
    store, _, _ = next(iter(rendezvous(url, timeout=START_TIMEOUT)))
    return store


def _key(what: str, rank: int) -> str:
    return f"deltakd/{what}/{rank}"


def _read(store: Any, what: str, rank: int) -> bytes:
    """What a rank has said; waits for it as long as the store is there, and so that signals get through."""
    try:
        while not store.check([_key(what, rank)]):
            time.sleep(POLL_SECONDS)
        return store.get(_key(what, rank))
    except RuntimeError:
        # The process that serves the store is gone.
        return _FAILED


def _await(store: Any, what: str, rank: int) -> None:
    if _read(store, what, rank) != _DONE:
        print(f"error: rank {rank} did not go on, so this rank can't either; see what it says", file=sys.stderr)
        sys.exit(2)
