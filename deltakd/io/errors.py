"""Errors that are the user's to mend: shown in one line, without a traceback."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException

from deltakd.io.files import WriteError, disk_reason
from deltakd.training.callbacks import Stopped
from deltakd.training.module import NonFiniteLossError

T = TypeVar("T")


class ConfigError(ValueError):
    """Everything that is wrong with a config, at once.

    Args:
        problems: one sentence each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        head = "" if len(problems) == 1 else f"{len(problems)} problems:\n  - "
        super().__init__(head + "\n  - ".join(problems))


def quiet_libraries() -> None:
    """Keep libraries' advertisements, device listings and bars of milliseconds off the console; warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


def guarded(action: Callable[[], T], how_to_resume: str) -> T:
    """Run an entry point's work; users' errors end the process with one line and exit status 2.

    A run that was stopped by a signal has saved its state; it ends with 128 + the signal's number, as shells expect,
    so that schedulers and ``&&`` do not take it for finished. HYDRA_FULL_ERROR=1 shows tracebacks.
    """
    quiet_libraries()
    try:
        return action()
    except Stopped as stop:
        print(f"{stop}. To go on: {how_to_resume}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print(f"interrupted. To go on from the last checkpoint: {how_to_resume}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, NonFiniteLossError, MisconfigurationException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        reason = disk_reason(error)
        if reason is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        said = str(error) if isinstance(error, WriteError) else f"the disk failed ({reason})"
        print(f"error: {said}. Make room, then: {how_to_resume or 'the same command'}", file=sys.stderr)
        sys.exit(2)
