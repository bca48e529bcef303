"""Identifies this process, and coordinates ranks before there is a trainer.

Lightning's own launcher starts the other ranks once rank 0 is ready to train. torchrun and SLURM start all at once:
without coordination they would write the same files at the same time, and wait forever for a rank that gave up.
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

#: Maximum time between the starts of the first and the last rank, as in torch's own process groups.
START_TIMEOUT = timedelta(minutes=30)
#: Seconds between polls of the other ranks' messages.
POLL_SECONDS = 0.1
#: Seconds for which rank 0, which may serve the store, waits for the others to learn why it exits.
FAREWELL_SECONDS = 10.0

_DONE, _FAILED = b"done", b"failed"

#: Where launchers put the rank, in Lightning's order.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_main_process() -> bool:
    """Return True in the process that writes: rank 0, by the launcher's environment variables."""
    # Lightning takes seconds to import, so ask it only if it is imported: it may have learnt the rank since.
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    if lightning is not None:
        return int(getattr(lightning.rank_zero_only, "rank", 0)) == 0
    return int(next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), 0)) == 0


def external_launch() -> Launch | None:
    """Return the launch that started all ranks; None for one process, or if Lightning starts the others."""
    launch = read_launch(os.environ)
    return launch if launch is not None and launch.world_size > 1 and not launch.problem else None


def launch_id() -> str | None:
    """Return a name shared by all ranks and all restarts of this job; None if there is none."""
    launch = read_launch(os.environ)
    return None if launch is None else launch.id


def is_restarted() -> bool:
    """True if SLURM requeued this job or torchrun restarted it."""
    launch = read_launch(os.environ)
    return launch is not None and launch.restarted


@contextmanager
def main_process_first(what: str) -> Iterator[None]:
    """Run the block on rank 0, then on the others; all continue together. Collective: call on every rank.

    Does nothing if Lightning starts the other ranks.

    Args:
        what: names the block; the same on all ranks, and used once per process.

    Raises:
        SystemExit: with status 2, if another rank failed in the block.
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
        what: names the value; the same on all ranks, and used once per process.
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

    Others in this process, such as Lightning, can share it at the same address.
    """
    # Imported here: a single process needs neither library yet.
    from torch.distributed.rendezvous import rendezvous

    if launch.name == "SLURM":
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        environment = SLURMEnvironment(auto_requeue=False)
        # Reading them sets MASTER_ADDR and MASTER_PORT.
        assert environment.main_address
        assert environment.main_port
    url = f"env://?rank={launch.rank}&world_size={launch.world_size}"
    store, _, _ = next(iter(rendezvous(url, timeout=START_TIMEOUT)))
    return store


def _give_up(rank: int) -> NoReturn:
    print(f"error: rank {rank} stopped responding, so this rank stops, too; see its output", file=sys.stderr)
    sys.exit(2)


@final
class _Meeting:
    """The messages that ranks exchange at one point of the program."""

    def __init__(self, store: Any, launch: Launch, what: str) -> None:
        self._store = store
        self._launch = launch
        self._what = what

    def say(self, word: bytes, of: str = "word") -> None:
        """Tell all others."""
        # If the process that serves the store is gone, the others notice by themselves.
        with suppress(RuntimeError):
            self._store.set(self._key(self._launch.rank, of), word)

    def hear(self, rank: int, of: str = "word", seconds: float = math.inf) -> bytes | None:
        """Wait for a rank's message and return it; None if it is gone or too slow. Signals can interrupt the wait."""
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
        """Continue only if that rank does."""
        if self.hear(rank) != _DONE:
            _give_up(rank)

    def leave(self, seconds: float = math.inf) -> None:
        """Leave; rank 0, which may serve the store, waits for each other rank, at most ``seconds`` each."""
        self.say(_DONE, "farewell")
        if self._launch.rank == 0:
            for rank in range(1, self._launch.world_size):
                self.hear(rank, "farewell", seconds)

    def _key(self, rank: int, of: str) -> str:
        return f"deltakd/{self._what}/{of}/{rank}"
