"""Errors that users can fix, and the exception that ends a training run early.

Disk errors are :class:`deltakd.io.files.WriteError`. ``deltakd.cli`` turns all of them into messages and statuses.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence


class ConfigError(ValueError):
    """All problems of a config at once.

    Args:
        problems: one sentence each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        head = "" if len(problems) == 1 else f"{len(problems)} problems:\n  - "
        super().__init__(head + "\n  - ".join(problems))


class NonFiniteLossError(RuntimeError):
    """The loss, or its gradient, is NaN or infinite."""


class Stopped(Exception):  # noqa: N818 - not an error: the run was asked to stop, and did
    """The run was stopped by a signal after its state was saved.

    Args:
        signum: the signal.
        step: optimiser steps done.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after {step} optimiser steps; the state is saved")
        self.signum = signum
        self.step = step


class ServerError(ValueError):
    """A server that the run works with failed, between two optimiser steps: the run saves its state and stops."""


class LostServerError(ServerError):
    """The server is gone, or does not answer in time; it may come back."""


class RefusedError(ServerError):
    """The server is there, and refuses the request.

    Args:
        message: what was asked, and what it said.
        status: of its HTTP answer.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
