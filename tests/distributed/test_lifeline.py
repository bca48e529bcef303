"""Light processes that hold a lifeline, and die, fail or end."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

RANK = """
import sys
import deltakd.distributed.lifeline as lifeline
lifeline.GRACE_SECONDS = 0.5
rank = int(sys.argv[1])
processes = [lifeline.Process(r, "here", 1000 + r) for r in range(3)]
if rank == 0:
    listener = lifeline.listen("127.0.0.1", 3)
    port = listener.getsockname()[1]
    lifeline.Hub(listener, "secret", processes).start()
else:
    port = int(sys.stdin.readline())
line = lifeline.Line("127.0.0.1", port, "secret", rank, processes, lambda: "go on so")
line.start()
print(port, flush=True)
for command in sys.stdin:
    if command == "close\\n":
        line.close()
        print("closed", flush=True)
    else:
        print("failing", flush=True)
        line.fail(command.strip())
        sys.exit(2)
"""
DIED, FAILED = "has died; go on so\n", "has failed (no room); go on so\n"


class Ranks:
    """Three of them; ``port`` is the hub's."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        root = Path(__file__).resolve().parents[2]
        # Without site-packages: these start at once.
        command = [sys.executable, "-S", "-c", RANK]
        self.processes = [
            subprocess.Popen([*command, str(rank)], text=True, bufsize=1, cwd=root, **pipes) for rank in range(3)
        ]
        self.port = int(self.processes[0].stdout.readline())
        for rank in (1, 2):
            assert self.tell(rank, str(self.port)) == str(self.port)

    def tell(self, rank: int, command: str) -> str:
        assert self.processes[rank].poll() is None, self.processes[rank].stderr.read()
        self.processes[rank].stdin.write(command + "\n")
        return self.processes[rank].stdout.readline().strip()

    def end(self, rank: int) -> tuple[int, str]:
        """Wait until it ends by itself; status and what it said on stderr."""
        status = self.processes[rank].wait(timeout=20)
        return status, self.processes[rank].stderr.read()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    for process in started.processes:
        process.kill()
        for pipe in (process.stdin, process.stdout, process.stderr):
            # What was written to one that has ended is lost.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        process.wait()


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_rank_is_named_by_all_others(ranks: Ranks, dead: int) -> None:
    ranks.processes[dead].kill()
    for rank in {0, 1, 2} - {dead}:
        assert ranks.end(rank) == (1, f"rank {rank} ends: rank {dead} (pid {1000 + dead} on here) {DIED}")


def test_the_cause_is_told_and_not_its_echo(ranks: Ranks) -> None:
    for rank in (0, 2):
        ranks.tell(rank, "connection closed by peer")
    ranks.processes[1].kill()
    assert [ranks.end(rank) for rank in (0, 2)] == [
        (1, f"rank {r} ends: rank 1 (pid 1001 on here) {DIED}") for r in (0, 2)
    ]


@pytest.mark.parametrize("failing", [0, 1])
def test_the_reason_of_one_is_told_by_the_others(ranks: Ranks, failing: int) -> None:
    ranks.tell(failing, "no room")
    for rank in {0, 1, 2} - {failing}:
        assert ranks.end(rank) == (1, f"rank {rank} ends: rank {failing} (pid {1000 + failing} on here) {FAILED}")
    assert ranks.end(failing) == (2, "")


def test_what_all_say_is_left_to_each(ranks: Ranks) -> None:
    for rank in range(3):
        ranks.tell(rank, "stopped")
    assert [ranks.end(rank) for rank in range(3)] == [(2, "")] * 3


@pytest.mark.slow  # Ended early once in some fifty runs, on a busy machine.
def test_a_normal_end_is_silent(ranks: Ranks) -> None:
    with socket.create_connection(("127.0.0.1", ranks.port)) as stranger:
        stranger.sendall(b'{"hello": "s\xc3\xa9same", "rank": 2}\n')
        assert stranger.recv(1) == b""
    assert ranks.tell(1, "close") == "closed"
    ranks.processes[1].kill()
    ranks.processes[1].wait()
    for rank in (0, 2):
        assert ranks.tell(rank, "close") == "closed"
        ranks.processes[rank].stdin.close()
        assert ranks.end(rank) == (0, "")
