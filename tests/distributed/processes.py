"""Ranks as forked children of this process: they start warm, in a second instead of twenty."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

#: Seconds after which ranks that have not answered are taken to hang.
LIMIT = 240


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of ``count`` ranks, which Lightning takes for started by a launcher.

    Raises:
        AssertionError: a rank failed (with its traceback), or did not end.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, children = [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(rank, count, port, theirs, function, args))
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    try:
        answers = [_receive(pipe, rank) for rank, pipe in enumerate(pipes)]
    finally:
        for child, pipe in zip(children, pipes, strict=True):
            child.join(timeout=5)
            if child.is_alive():
                child.kill()
                child.join()
            pipe.close()
    problems = [f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(answers) if problem]
    assert not problems, "\n".join(problems)
    return [value for _, value in answers]


def _receive(pipe: Connection, rank: int) -> tuple[str, Any]:
    if not pipe.poll(LIMIT):
        return f"has not ended after {LIMIT} seconds", None
    try:
        return pipe.recv()
    except EOFError:
        return "died without a word", None


def _child(
    rank: int, count: int, port: int, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    rank_zero_only.rank = rank
    try:
        answer = "", function(*args)
    except BaseException:
        answer = traceback.format_exc(), None
    pipe.send(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the teardown of libraries, which belongs to the parent.
    os._exit(0)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
