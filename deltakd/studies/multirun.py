"""Jobs of a multirun: each result kept on disk, whatever launched it; table, plot and best setting at the end."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from deltakd.distributed.ranks import is_main_process
from deltakd.io.files import write_json
from deltakd.io.garbage import nothing_left
from deltakd.io.run_directory import RunDirectory
from deltakd.studies.outcomes import (
    FAILED,
    FINISHED,
    UNFINISHED,
    Outcome,
    find_best,
    in_short,
    incomparable,
    write_table,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One job of a multirun.

    Args:
        number: Hydra's number.
        root: of the multirun.
        overrides: all overrides of the job.
        run_dir: the run directory.
    """

    number: int
    root: Path
    overrides: Sequence[str]
    run_dir: Path

    @property
    def record(self) -> Path:
        """The file that holds the job's result."""
        return self.root / "jobs" / f"{self.number}.json"

    def write(self, state: str, seconds: float | None = None) -> None:
        settings = dict(override.split("=", 1) for override in self.overrides if "=" in override)
        directory = os.path.relpath(self.run_dir, self.root)
        content = {"settings": settings, "state": state, "seconds": seconds, "directory": directory}
        write_json(self.record, content)


def run_job(job: Job, action: Callable[[], float]) -> float:
    """Run a job; a failed job does not stop the others.

    Hydra would end the multirun at the first job that exits, and show nothing at the end if one raised.

    Args:
        job: the job.
        action: the training run; returns the objective, and raises SystemExit for errors that users can fix.

    Returns:
        The objective; NaN if the job failed.
    """
    if is_main_process():
        job.write(UNFINISHED)
    started, value, state = time.perf_counter(), float("nan"), FAILED
    try:
        with nothing_left():
            value, state = action(), FINISHED
    except SystemExit as end:
        # 2 is a mistake in this job's settings, or a loss that diverged; anything else is a signal, meant for all jobs.
        if end.code != 2:
            _hand_on(end.code)
            raise
    except Exception:
        log.exception("job %d failed", job.number)
    if is_main_process():
        job.write(state, time.perf_counter() - started)
    return value


def _hand_on(status: Any) -> None:
    """Pass the signal with which SLURM stopped the run on to submitit, so that it requeues the job."""
    if "SUBMITIT_EXECUTOR" in os.environ and status in (128 + signal.SIGUSR1, 128 + signal.SIGUSR2):
        signum = status - 128
        if callable(signal.getsignal(signum)):
            signal.raise_signal(signum)


@final
class MultirunSummary(Callback):
    """Hydra's callback at both ends of a multirun: prints its best value, writes ``multirun.csv`` and ``.png``.

    The process exits with status 2 if a job failed.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Forget the jobs of an earlier start, which may have differed."""
        if is_main_process():
            shutil.rmtree(_root(config) / "jobs", ignore_errors=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the results of the jobs."""
        root = _root(config)
        outcomes = read_outcomes(root) if is_main_process() else []
        if not outcomes:
            return
        for line in conclude(outcomes, root):
            print(line)
        failed = [o for o in outcomes if o.state == FAILED]
        if failed:
            named = "; ".join(f"{o.number} ({in_short(o.settings)})" for o in failed)
            print(f"error: {len(failed)} of {len(outcomes)} jobs failed: {named}", file=sys.stderr)
            sys.exit(2)


def _root(config: DictConfig) -> Path:
    return Path(config.run_dir or config.hydra.sweep.dir)


def read_outcomes(root: Path) -> list[Outcome]:
    """Return the results of a multirun's jobs, with the settings in which they differ."""
    records = {int(path.stem): json.loads(path.read_text()) for path in (root / "jobs").glob("*.json")}
    settings = [record["settings"] for record in records.values()]
    keys = [k for k in dict.fromkeys(k for s in settings for k in s) if len({s.get(k) for s in settings}) > 1]
    outcomes = []
    for number, record in sorted(records.items()):
        directory = RunDirectory(root / record["directory"])
        objective, value = "", None
        if record["state"] == FINISHED:
            summary = directory.read_summary()
            objective = summary["meta"]["objective"]
            value = float(summary[objective])
        chosen = {key: record["settings"][key] for key in keys if key in record["settings"]}
        outcomes.append(Outcome(number, chosen, record["state"], objective, value, record["seconds"], directory.path))
    return outcomes


def conclude(outcomes: Sequence[Outcome], root: Path) -> list[str]:
    """Write table and plot; return the lines that report the best setting."""
    # Every training run imports this module, but few get here.
    from deltakd.evaluation.settings import SCORES
    from deltakd.studies.outcome_plots import write_plot

    table, plot = root / "multirun.csv", root / "multirun.png"
    write_table(outcomes, table)
    written = f"written: {table}"
    objectives = {o.objective for o in outcomes if o.objective}
    if not objectives:
        return [written]
    if len(objectives) > 1:
        return [f"the jobs have different objectives ({', '.join(sorted(objectives))}): none is best", written]
    (objective,) = objectives
    maximize = objective in SCORES
    if write_plot(outcomes, maximize, f"{root.name}: {len(outcomes)} jobs", plot):
        written += f", {plot}"
    problem = incomparable(objective, list(outcomes[0].settings))
    best = find_best(outcomes, maximize)
    if problem or best is None:
        return [f"warning: {problem}"] * bool(problem) + [written]
    return [f"best {objective} = {best}: {in_short(best.settings)}  ({best.directory})", written]
