"""Run the slow tests that every commit must pass, the cheapest and most valuable first, until the time is over.

``make test-slow`` runs all slow tests. These need less than 25 minutes on an idle machine with two cores.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import pytest

#: Seconds on an idle machine with two cores, and the test.
TESTS: tuple[tuple[int, str], ...] = ()


class TimeLimit:
    """A pytest plugin that ends the tests when the time is over, without failing them.

    Args:
        seconds: how much time there is.
    """

    def __init__(self, seconds: float) -> None:
        self.unreached: list[str] = []
        self._end = time.monotonic() + seconds
        self._running = ""
        signal.signal(signal.SIGALRM, self._stop)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Leave out a test that would begin too late."""
        if time.monotonic() < self._end:
            return None
        self.unreached.append(item.nodeid)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Interrupt a test that is still running at the end."""
        self._running = item.nodeid
        signal.setitimer(signal.ITIMER_REAL, max(self._end - time.monotonic(), 0.001))
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _stop(self, signum: int, frame: FrameType | None) -> NoReturn:
        self.unreached.append(f"{self._running} (interrupted)")
        pytest.skip("out of time")


def main() -> int:
    """Run the tests; return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40 * 60, help="time for all of them (default: 40 minutes)")
    parser.add_argument("tests", nargs="*", metavar="TEST", help="in place of the list in this file")
    given = parser.parse_args()
    limit = TimeLimit(given.seconds)
    tests = given.tests or [test for _, test in TESTS]
    # Whatever their markers: the ones that are listed run.
    status = pytest.main(["-m", "", "-vv", "--durations=0", *tests], plugins=[limit])
    if limit.unreached:
        print(f"out of time, {len(limit.unreached)} of the slow tests were not reached: {', '.join(limit.unreached)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
