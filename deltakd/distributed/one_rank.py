"""Work that one rank does for all."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch.distributed as dist

from deltakd.distributed.sharding import place
from deltakd.io.errors import LostServerError, ServerError

T = TypeVar("T")

#: Seconds between two signs of life from rank 0.
BEAT_SECONDS = 5.0


def by_rank_zero(work: Callable[[], T]) -> T:
    """Return what ``work`` returns on rank 0, on every rank. Collective: call on every rank.

    Meanwhile the ranks exchange a message every few seconds, so that no collective operation runs into its timeout
    however long the work takes. If it fails, every rank fails.

    Args:
        work: run on rank 0 alone, with several ranks in a thread of its own; returns something that can be pickled.

    Raises:
        ServerError: on ranks above 0, if the work failed; rank 0 raises the error itself.
    """
    rank, world_size = place()
    if world_size == 1:
        return work()
    if rank > 0:
        return _received()
    with ThreadPoolExecutor(1, thread_name_prefix="by-rank-zero") as pool:
        future = pool.submit(work)
        while not wait([future], BEAT_SECONDS).done:
            _broadcast(("working", None))
        _broadcast(_outcome(future))
        return future.result()


def _received() -> Any:
    while True:
        kind, value = _broadcast(None)
        if kind == "done":
            return value
        if kind != "working":
            raise (LostServerError if kind == "lost" else ServerError)(value)


def _outcome(future: Future[Any]) -> tuple[str, Any]:
    error = future.exception()
    if error is None:
        return "done", future.result()
    return "lost" if isinstance(error, LostServerError) else "failed", str(error) or type(error).__name__


def _broadcast(message: tuple[str, Any] | None) -> tuple[str, Any]:
    messages = [message]
    dist.broadcast_object_list(messages, src=0)
    assert messages[0] is not None
    return messages[0]
