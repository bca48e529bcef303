"""Which process this is, and what all ranks do together before any trainer exists.

Lightning's own launcher starts the other ranks once rank 0 is ready to train. torchrun and SLURM start all of them at
once: they would make the same files at the same time, and wait in vain for one that has given up.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any, NoReturn, final

from deltakd.distributed.launchers import Launch, read_launch

#: How long the last of all ranks may take to start after the first, as in torch's own process groups.
START_TIMEOUT = timedelta(minutes=30)
#: Seconds between two looks at what the other ranks have said.
POLL_SECONDS = 0.1
#: How long rank 0, which may serve the store, waits for the others to have heard why it ends.
FAREWELL_SECONDS = 10.0

_DONE, _FAILED = b"done", b"failed"

#: Where launchers leave the rank, in Lightning's order.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_main_process() -> bool:
    """Return True in the process that writes: rank 0, from what the launcher left in the environment."""
    # Lightning takes seconds to import. Where it is there, it may have been told the rank since.
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    if lightning is not None:
        return int(getattr(lightning.rank_zero_only, "rank", 0)) == 0
    return int(next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), 0)) == 0


def external_launch() -> Launch | None:
    """Return who started all ranks of this run; None if it is one process, or Lightning starts the others."""
    launch = read_launch(os.environ)
    return launch if launch is not None and launch.world_size > 1 and not launch.problem else None


def launch_id() -> str | None:
    """Return a name that all ranks of this job share, and later starts of it; None if it has none."""
    launch = read_launch(os.environ)
    return None if launch is None else launch.id


def is_restarted() -> bool:
    """True if a launcher has started this job again: requeued by SLURM, or restarted by torchrun."""
    launch = read_launch(os.environ)
    return launch is not None and launch.restarted


@contextmanager
def main_process_first(what: str) -> Iterator[None]:
    """Let rank 0 go through the block first, then the others; nobody goes on until all have. Collective.

    If Lightning starts the other ranks, there is nothing to do.

    Args:
        what: a name of the block, the same on all ranks, and used once in a process.

    Raises:
        SystemExit: with status 2, if another rank did not get through.
    """
    launch = external_launch()
    if launch is None:
        yield
        return
    meeting = _Meeting(_store(launch), launch, what)
    try:
        if launch.rank > 0:
            meeting.expect(0)
        yield
        meeting.say(_DONE)
        for rank in range(launch.world_size):
            meeting.expect(rank)
    except BaseException:
        meeting.say(_FAILED)
        meeting.leave(FAREWELL_SECONDS)
        raise
    meeting.leave()


def agreed(what: str, value: str) -> str:
    """Return rank 0's value on all ranks. Collective: call on every rank.

    Args:
        what: a name of the value, the same on all ranks, and used once in a process.
        value: this rank's own.
    """
    launch = external_launch()
    if launch is None:
        return value
    meeting = _Meeting(_store(launch), launch, what)
    if launch.rank == 0:
        meeting.say(value.encode())
    said = meeting.hear(0)
    if said is None:
        _give_up(0)
    meeting.leave()
    return said.decode()


@lru_cache(maxsize=1)
def _store(launch: Launch) -> Any:
    """Return the store over which the process group will be joined later: torchrun's, or one that rank 0 serves.

    Several users in a process can share it at the same address, Lightning among them.
    """
    # Where one process is all there is, neither library is needed yet.
    from torch.distributed.rendezvous import rendezvous

    if launch.name == "SLURM":
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        environment = SLURMEnvironment(auto_requeue=False)
        # Asked for, they are put into the environment.
        assert environment.main_address
        assert environment.main_port
    url = f"env://?rank={launch.rank}&world_size={launch.world_size}"
    store, _, _ = next(iter(rendezvous(url, timeout=START_TIMEOUT)))
    return store


def _give_up(rank: int) -> NoReturn:
    print(f"error: rank {rank} did not go on, so this rank can't either; see what it says", file=sys.stderr)
    sys.exit(2)


@final
class _Meeting:
    """What the ranks tell each other at one place of the program."""

    def __init__(self, store: Any, launch: Launch, what: str) -> None:
        self._store = store
        self._launch = launch
        self._what = what

    def say(self, word: bytes, of: str = "word") -> None:
        """Tell all others."""
        # Where the process that serves the store is gone, the others hear of it by themselves.
        with suppress(RuntimeError):
            self._store.set(self._key(self._launch.rank, of), word)

    def hear(self, rank: int, of: str = "word", seconds: float = math.inf) -> bytes | None:
        """Return what a rank has said; None if it is gone. Waits in a way that lets signals through."""
        deadline = time.monotonic() + seconds
        try:
            while not self._store.check([self._key(rank, of)]):
                if time.monotonic() > deadline:
                    return None
                time.sleep(POLL_SECONDS)
            return self._store.get(self._key(rank, of))
        except RuntimeError:
            return None

    def expect(self, rank: int) -> None:
        """Go on only if that rank does."""
        if self.hear(rank) != _DONE:
            _give_up(rank)

    def leave(self, seconds: float = math.inf) -> None:
        """Leave; rank 0, which may serve the store, waits until the others leave, at most ``seconds``."""
        self.say(_DONE, "farewell")
        if self._launch.rank == 0:
            for rank in range(1, self._launch.world_size):
                self.hear(rank, "farewell", seconds)

    def _key(self, rank: int, of: str) -> str:
        return f"deltakd/{self._what}/{of}/{rank}"
