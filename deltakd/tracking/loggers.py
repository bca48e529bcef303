"""Loggers that write into the run directory.

Config checks import this module, so Lightning, which provides the loggers, is imported only when one is created.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args
from urllib.parse import urlparse

from deltakd.io.files import write_text
from deltakd.io.home import home_directory
from deltakd.tracking.environment import checkout
from deltakd.tracking.redaction import redacted

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

#: Seconds to wait for the W&B server before continuing offline.
REACH_SECONDS = 3.0

Mode = Literal["auto", "online", "offline", "disabled"]
#: Values of WANDB_MODE that W&B accepts -> True if online.
_MODES_OF_WANDB = {
    "online": True,
    "run": True,
    "shared": True,
    "offline": False,
    "dryrun": False,
    "disabled": False,
}


class MakeLogger(Protocol):
    """Creates a logger once the run directory exists: an entry of the group ``logger``."""

    def __call__(self, *, directory: Path, name: str, config: dict[str, Any], resume_step: int) -> Logger: ...


def make_loggers(
    makers: Iterable[MakeLogger], name: str, record: Mapping[str, Any], directory: Path, resume_step: int
) -> list[Logger]:
    """Make the loggers of a run.

    Args:
        makers: the loggers that the group ``logger`` names.
        name: the run's name.
        record: its resolved config, to be logged.
        directory: the run directory.
        resume_step: the optimiser step that the run resumes from; logs up to it are kept.
    """
    return [make(directory=directory, name=name, config=dict(record), resume_step=resume_step) for make in makers]


def finish_loggers(loggers: list[Logger], failed: bool = False) -> None:
    """Flush and close the loggers; an open W&B run would swallow the next run of this process.

    Args:
        loggers: all loggers of the run.
        failed: True if the run did not finish; W&B shows it.
    """
    from deltakd.tracking.wandb_run import RunWandbLogger

    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, RunWandbLogger):
            logger.experiment.finish(exit_code=int(failed))


def csv_logger(*, directory: Path, name: str, config: dict[str, Any], resume_step: int) -> Logger:
    from deltakd.tracking.csv_run import RunCSVLogger

    return RunCSVLogger(directory, resume_step)


def tensorboard_logger(*, directory: Path, name: str, config: dict[str, Any], resume_step: int) -> Logger:
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(
        save_dir=directory,
        name="tensorboard",
        version="",
        # A resumed run repeats the steps after its checkpoint.
        purge_step=resume_step + 1 if resume_step else None,
    )
    logger.log_hyperparams(config)
    return logger


def wandb_logger(
    *,
    directory: Path,
    name: str,
    config: dict[str, Any],
    resume_step: int,
    project: str,
    mode: Mode = "auto",
    group: str | None = None,
    log_model: bool = False,
) -> Logger:
    """Return a Weights & Biases logger, by default online only if that works without asking the user.

    Args:
        directory: the run directory; offline runs are kept in its ``wandb/``.
        name: the run's name.
        config: recorded without home directories and secrets, like everything sent to W&B.
        resume_step: unused; W&B keeps its own history.
        project: the W&B project.
        mode: auto, online, offline or disabled. auto is WANDB_MODE if set; else online if an API key is available and
            the server answers within REACH_SECONDS; else offline.
        group: the W&B group, such as the study.
        log_model: upload the exported student's weights, too; its fingerprint and lineage are always uploaded.

    Raises:
        ValueError: unknown mode.
    """
    import wandb  # costs over a second, and runs without it should not pay

    from deltakd.tracking.wandb_run import RunWandbLogger

    if mode not in get_args(Mode):
        raise ValueError(f"logger.wandb.mode is {mode!r}; allowed: {', '.join(get_args(Mode))}")
    chosen: str = mode
    if mode == "auto":
        chosen = os.environ.get("WANDB_MODE") or ("online" if _logged_in() and _server_answers() else "offline")
    # A resumed run stays the same W&B run; in a sweep, it is the run that the agent was given.
    id_file = directory / "wandb_id"
    agents = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    if agents or not id_file.is_file():
        write_text(id_file, agents or uuid.uuid4().hex[:8])
    if home_directory() is None:
        # W&B looks there in many places, even if it needs nothing, and fails in each.
        os.environ["HOME"] = str(directory / "wandb")
    root = checkout()
    run = wandb.init(
        name=name,
        project=project,
        group=group,
        id=id_file.read_text(),
        resume="allow",
        dir=directory,
        config=redacted(config),
        settings=wandb.Settings(
            mode=cast(Any, chosen),
            silent=True,
            console="off",
            # The metadata that W&B collects itself include host, user, command line and the interpreter's path.
            x_disable_meta=True,
            host="",
            git_root=None if root is None else str(root),
            # Else it takes the repository around the run directory, which is the user's.
            disable_git=root is None,
            disable_code=True,
            disable_job_creation=True,
        ),
    )
    return RunWandbLogger(run, directory, log_model)


def logger_problems(makers: Mapping[str, MakeLogger]) -> list[str]:
    """Return why a logger could not start, one sentence each; W&B asks for its key only after models are loaded.

    Args:
        makers: name in the config -> the logger's factory.
    """
    found = []
    for name, make in makers.items():
        if isinstance(make, partial) and make.func is wandb_logger:
            mode = make.keywords.get("mode", "auto")
            told = "WANDB_MODE" if mode == "auto" else f"logger.{name}.mode"
            found += _wandb_problems(told, os.environ.get("WANDB_MODE") if mode == "auto" else mode, name)
    return found


def _wandb_problems(told: str, mode: str | None, name: str) -> list[str]:
    """Return the problems of the given mode; without one, the mode is chosen by availability."""
    if not mode:
        return []
    if mode not in _MODES_OF_WANDB:
        return [f"{told} is {mode!r}; allowed: {', '.join(_MODES_OF_WANDB)}"]
    if not _MODES_OF_WANDB[mode] or _logged_in():
        return []
    return [
        f"{told} is {mode}, but there is no W&B key for {_server()[0]}; run `wandb login`, set WANDB_API_KEY, or give "
        f"logger.{name}.mode=offline"
    ]


def _logged_in() -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    # Where W&B looks; without a home directory these paths stay unexpanded, and do not exist.
    named = os.environ.get("NETRC")
    for place in [named] if named else ["~/.netrc", "~/_netrc"]:
        try:
            if netrc.netrc(os.path.expanduser(place)).authenticators(_server()[0]) is not None:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _server() -> tuple[str, int]:
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def _server_answers() -> bool:
    try:
        with socket.create_connection(_server(), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False
