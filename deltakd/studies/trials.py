"""A local search without a server: Optuna chooses the trials of a sweep file, and each trial is a run."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from optuna.study import StudyDirection
from optuna.trial import TrialState
from rich.console import Console

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError, NonFiniteLossError
from deltakd.io.files import make_folder
from deltakd.io.garbage import nothing_left
from deltakd.studies.outcome_plots import write_plot
from deltakd.studies.outcomes import (
    ENDED_EARLY,
    FAILED,
    FINISHED,
    UNFINISHED,
    Outcome,
    find_best,
    in_short,
    incomparable,
    write_table,
)
from deltakd.studies.pruning import reporting_to
from deltakd.studies.sweep_files import Choices, Interval, Parameter, Scalar, Sweep, merge_overrides, override
from deltakd.training.run import run_training
from deltakd.training.settings import RESUME_POLICY

#: Number of trials if neither the command line nor the file gives one.
DEFAULT_TRIALS = 20

#: Random trials before a Bayesian search starts to model.
_STARTUP_TRIALS = 10

#: Errors that end a trial, but not the search.
_FAILURES = (NonFiniteLossError, torch.OutOfMemoryError)

_STATES = {TrialState.COMPLETE: FINISHED, TrialState.PRUNED: ENDED_EARLY, TrialState.FAIL: FAILED}

#: Trains one trial: composed config, run directory -> value of the objective.
Train = Callable[[DictConfig, Path], float]


def train_config(cfg: DictConfig, run_dir: Path) -> float:
    """Train a composed config; return the value of its metric."""
    with nothing_left():
        return run_training(make_settings(cfg), run_dir)


@dataclass(frozen=True)
class Search:
    """A sweep file and where its trials go.

    Args:
        sweep: the file's content.
        storage: SQLite file with all trials; their run directories are beside it.
        trials: number of trials, including earlier starts'; None: the file's ``run_cap``, the whole grid, or
            DEFAULT_TRIALS.
        train: trains one trial.
    """

    sweep: Sweep
    storage: Path
    trials: int | None = None
    train: Train = field(default=train_config)

    @property
    def name(self) -> str:
        """Name of the study, of W&B's group, and the first part of the runs' names."""
        return self.sweep.path.stem

    @property
    def directory(self) -> Path:
        """The folder of the run directories and the results."""
        return self.storage.parent

    @property
    def total(self) -> int:
        """The total number of trials to run."""
        asked = self.trials or self.sweep.run_cap
        if self.sweep.method != "grid":
            return asked or DEFAULT_TRIALS
        size = sum(1 for _ in self.sweep.grid())
        return min(asked or size, size)

    def overrides(self, params: dict[str, Scalar], number: int) -> list[str]:
        directory = self.directory / str(number)
        own = [f"objective={self.sweep.metric}", f"name={self.name}/{number}", f"run_dir={directory}", "resume=true"]
        if self.sweep.hyperband:
            own.append("+callbacks.report_to_search._target_=deltakd.studies.pruning.ReportToSearch")
        return merge_overrides(self.sweep.overrides, [override(k, v) for k, v in params.items()], own)


def run_search(search: Search, console: Console) -> list[Outcome]:
    """Run the remaining trials; an interrupted trial resumes from its checkpoint.

    Args:
        search: the parameters, and where the trials go.
        console: progress and the best value are shown here.

    Returns:
        All trials, including earlier starts'.

    Raises:
        ConfigError: all problems of the config, before anything starts; the storage holds another
            search; another process works on it.
        Stopped: SIGTERM or Ctrl-C came; the trial's state is saved.
        ValueError: data or models that can't be used.
    """
    _check(search)
    make_folder(search.directory, "the search")
    with _only_process(search), _opened(search) as study:
        warning = incomparable(search.sweep.metric, list(search.sweep.parameters))
        if warning:
            _say(console, f"warning: {warning}")
        started, here = time.perf_counter(), 0
        while (trial := _next_trial(search, study)) is not None:
            left = search.total - _count_done(study)
            known = f" (about {_duration((time.perf_counter() - started) / here * left)} left)" if here else ""
            _run_trial(search, study, trial, console, known)
            here += 1
            write_table(_outcomes(search, study), search.directory / "search.csv")
        outcomes = _outcomes(search, study)
    _conclude(search, outcomes, console)
    return outcomes


def _check(search: Search) -> None:
    """Compose and plan a first trial, to report config errors before anything starts."""
    params = {k: p.values[-1] if isinstance(p, Choices) else p.high for k, p in search.sweep.parameters.items()}
    cfg = compose_config("train", search.overrides(params, 0))
    settings = make_settings(cfg)
    problems = []
    if settings.metric != search.sweep.metric:
        problems.append(
            f"metric.name is {search.sweep.metric}, but this config's runs are judged by {settings.metric}: it "
            "generates no answers, or validates on nothing; change the metric, evaluation.generate, data.val or "
            "data.val_size"
        )
    elif settings.metric_mode != search.sweep.goal[:3]:
        problems.append(
            f"metric.goal is {search.sweep.goal}, but of {settings.metric} more is "
            f"{'better' if settings.metric_mode == 'max' else 'worse'}; change metric.goal"
        )
    if settings.trainer.devices not in (1, "1", "auto") or settings.trainer.num_nodes != 1:
        problems.append(
            f"trainer.devices is {settings.trainer.devices}: a search trains in its own process, on one device; for "
            "more use deltakd.train --multirun, or W&B's agents"
        )
    if problems:
        raise ConfigError([f"{search.sweep.path}: {problem}" for problem in problems])


@contextmanager
def _only_process(search: Search) -> Iterator[None]:
    """Keep other processes out: trials found running must then have been interrupted."""
    try:
        with FileLock(search.storage.with_suffix(".lock"), timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            [f"another process is searching in {search.directory}; wait for it, or give another --storage"]
        ) from None


@contextmanager
def _opened(search: Search) -> Iterator[optuna.Study]:
    """Open the study in its storage, creating it if need be.

    Raises:
        ConfigError: the storage holds another search.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{search.storage}")
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=search.name,
            direction=StudyDirection.MAXIMIZE if search.sweep.maximize else StudyDirection.MINIMIZE,
            pruner=_pruner(search.sweep),
            load_if_exists=True,
        )
        held, now = study.user_attrs.get("search"), _identity(search)
        if held is None:
            study.set_user_attr("search", now)
        elif held != now:
            differing = [key for key in sorted({*held, *now}) if held.get(key) != now.get(key)]
            shown = ", ".join(f"{k} ({held.get(k)} there, {now.get(k)} now)" for k in differing)
            raise ConfigError(
                [f"{search.storage} holds another search: {shown}; give another --storage, or remove that folder"]
            )
        if search.sweep.method == "grid" and not study.get_trials(deepcopy=False):
            # Queueing keeps the combinations in the file's order, whenever the search is interrupted.
            for params in search.sweep.grid():
                study.enqueue_trial(params)
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _identity(search: Search) -> dict[str, Any]:
    """Return what identifies this search, as JSON for the storage."""
    sweep = search.sweep
    overrides = dict(text.lstrip("+").split("=", 1) for text in sweep.overrides)
    kept = {key: value for key, value in overrides.items() if not RESUME_POLICY.allows(key, finished=True)}
    parameters = {f"parameters.{key}": str(parameter) for key, parameter in sweep.parameters.items()}
    method = {"method": sweep.method, "metric": f"{sweep.goal} {sweep.metric}", "early_terminate": str(sweep.hyperband)}
    return json.loads(json.dumps(kept | parameters | method))


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    if sweep.hyperband is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.HyperbandPruner(
        min_resource=sweep.hyperband.min_resource,
        max_resource=sweep.hyperband.max_resource or "auto",
        reduction_factor=sweep.hyperband.reduction_factor,
    )


def _sampler(sweep: Sweep, number: int) -> optuna.samplers.BaseSampler:
    """Return a sampler seeded by the trial's number: an interrupted search draws the same as an uninterrupted one."""
    if sweep.method == "bayes":
        return optuna.samplers.TPESampler(seed=number, n_startup_trials=_STARTUP_TRIALS)
    return optuna.samplers.RandomSampler(seed=number)


def suggest(trial: optuna.Trial, key: str, parameter: Parameter) -> Scalar:
    """Return the parameter's value: the one that the trial already has, or one from the study's sampler."""
    if isinstance(parameter, Choices):
        chosen = trial.suggest_categorical(key, parameter.values)
        assert chosen is not None
        return chosen
    if parameter.integer:
        return trial.suggest_int(key, int(parameter.low), int(parameter.high))
    drawn = trial.suggest_float(key, parameter.low, parameter.high, log=parameter.log, step=parameter.step)
    return _as_drawn(parameter, drawn)


def _as_drawn(parameter: Parameter | None, value: Scalar) -> Scalar:
    """Return a number of whole steps as an integer: Optuna stores 2.0, which row counts do not accept."""
    whole = isinstance(parameter, Interval) and parameter.whole and isinstance(value, float)
    return round(value) if whole else value  # type: ignore[arg-type]


def _count_done(study: optuna.Study) -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def _next_trial(search: Search, study: optuna.Study) -> optuna.Trial | None:
    """Return the trial that was interrupted, else a new one; None when all are done."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    done = _count_done(study)
    study.sampler = _sampler(search.sweep, done)
    if running:
        return optuna.Trial(study, running[0]._trial_id)
    return study.ask() if done < search.total else None


def _run_trial(search: Search, study: optuna.Study, trial: optuna.Trial, console: Console, known: str) -> None:
    params = {key: suggest(trial, key, parameter) for key, parameter in search.sweep.parameters.items()}
    cfg = compose_config("train", search.overrides(params, trial.number))
    if OmegaConf.select(cfg, "logger.wandb.group", default="") is None:
        cfg.logger.wandb.group = search.name
    head = f"[{trial.number + 1}/{search.total}]"
    _say(console, f"{head} {in_short({k: str(v) for k, v in params.items()})} ...{known}")
    started = time.perf_counter()
    value, state = None, TrialState.COMPLETE
    try:
        with reporting_to(trial, search.sweep.metric):
            value = search.train(cfg, search.directory / str(trial.number))
        outcome = f"{search.sweep.metric} = {value:.6g}"
    except optuna.TrialPruned as pruned:
        outcome, state = str(pruned), TrialState.PRUNED
    except _FAILURES as error:
        outcome, state = f"failed: {' '.join(str(error).split())}", TrialState.FAIL
    seconds = time.perf_counter() - started
    trial.set_user_attr("seconds", seconds)
    study.tell(trial, value, state=state)
    best = find_best(_outcomes(search, study), search.sweep.maximize)
    so_far = f"; best so far {best} ({in_short(best.settings)})" if best else ""
    _say(console, f"{head} {outcome}, {_duration(seconds)}{so_far}")


def _outcomes(search: Search, study: optuna.Study) -> list[Outcome]:
    outcomes = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        drawn = {key: _as_drawn(search.sweep.parameters.get(key), value) for key, value in trial.params.items()}
        values = {key: override(key, value).split("=", 1)[1] for key, value in drawn.items()}
        state = _STATES.get(trial.state, UNFINISHED)
        # A trial that ended early has the value of its last validation.
        value = trial.value if state in (FINISHED, ENDED_EARLY) else None
        seconds = trial.user_attrs.get("seconds")
        directory = search.directory / str(trial.number)
        outcomes.append(Outcome(trial.number, values, state, search.sweep.metric, value, seconds, directory))
    return outcomes


def _conclude(search: Search, outcomes: Sequence[Outcome], console: Console) -> None:
    """Write table and plot, and report the best setting."""
    maximize = search.sweep.maximize
    table, plot = search.directory / "search.csv", search.directory / "search.png"
    write_table(outcomes, table)
    title = f"{search.name}: {len(outcomes)} trials"
    written = [table] + ([plot] if write_plot(outcomes, maximize, title, plot) else [])
    best = find_best(outcomes, maximize)
    if best is None:
        _say(console, f"No trial came to its end: {table}")
        return
    command = merge_overrides(search.sweep.overrides, best.overrides)
    _say(console, f"best {search.sweep.metric} = {best}: {in_short(best.settings)}  ({best.directory})")
    _say(console, f"again: python -m deltakd.train {shlex.join(command)}")
    _say(console, f"written: {', '.join(map(str, written))}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
