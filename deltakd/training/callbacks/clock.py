"""Time that training takes on its device."""

from __future__ import annotations

import time
from collections import deque
from typing import final

import torch


@final
class DeviceClock:
    """Times work from its start to its end on the device that computes it, without waiting for either.

    On a GPU the host only queues work and runs ahead, so its own clock would time the queueing.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._start: torch.cuda.Event | None = None
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    def start(self, device: torch.device) -> None:
        """Begin, once the device has done what was queued before."""
        self._start = _mark(device) if device.type == "cuda" else None
        self._began = time.perf_counter()

    def stop(self, device: torch.device) -> None:
        """End, once the device has done what was queued since ``start``."""
        if self._start is None:
            self._seconds += time.perf_counter() - self._began
        else:
            self._open.append((self._start, _mark(device)))

    def take(self, wait: bool) -> float:
        """Return the seconds that have ended since the last call.

        Args:
            wait: for the device to end everything; False: leave for later what it has not.
        """
        while self._open and (wait or self._open[0][1].query()):
            start, end = self._open.popleft()
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _mark(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
