"""Spreads work over processes forked from this one, so nothing has to be copied to them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")

_PARALLELISM = "TOKENIZERS_PARALLELISM"
#: Linux: sets the signal that a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1
#: The work to do; forked processes find it here.
_work: Callable[[int], Any] | None = None


def usable_processes() -> int:
    """Return the number of processes to use for tokenising.

    The variables of the `tokenizers` library apply: TOKENIZERS_PARALLELISM=false gives one process, RAYON_NUM_THREADS
    sets the number. The default is the number of cores that this process may use, or one where forking is not safe:
    outside Linux, and after CUDA has been used.
    """
    torch = sys.modules.get("torch")
    if sys.platform != "linux" or (torch is not None and torch.cuda.is_initialized()):
        return 1
    if os.environ.get(_PARALLELISM, "").lower() in ("off", "false", "f", "no", "n", "0"):
        return 1
    given = os.environ.get("RAYON_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else len(os.sched_getaffinity(0))


def in_order(work: Callable[[int], T], count: int, processes: int) -> Iterator[T]:
    """Yield work(0), work(1) ... work(count - 1), computed in forked processes if there is more than one.

    Args:
        work: must return what can be pickled.
        count: number of pieces.
        processes: number to use at once.

    Raises:
        ValueError: a process was killed.
        Exception: what ``work`` raises.
    """
    if processes < 2 or count < 2:
        yield from map(work, range(count))
        return
    with _forked(work, min(processes, count)) as pool:
        waiting: deque[Future[Any]] = deque()
        for number in range(count):
            waiting.append(pool.submit(_do, number))
            # Stay close to the consumer of the results.
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _forked(work: Callable[[int], Any], processes: int) -> Iterator[ProcessPoolExecutor]:
    global _work
    held = os.environ.get(_PARALLELISM)
    _work = work
    # Without threads of their own: the library's do not survive a fork, and it says so at length.
    os.environ[_PARALLELISM] = "false"
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin, (os.getpid(),))
    try:
        with warnings.catch_warnings():
            # Safe: other threads of this process hold no lock that the work needs.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            yield pool
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that tokenised rows was killed, perhaps because memory ran out; use fewer of them, such as "
            "RAYON_NUM_THREADS=1, or find its reason in the system's log"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        _work = None
        if held is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = held


def _begin(parent: int) -> None:
    # The parent reports the error; without a parent, nobody needs the result.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _do(number: int) -> Any:
    assert _work is not None, "not forked for any work"
    return _work(number)
