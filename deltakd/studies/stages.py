"""Run the stages of a study, one after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from deltakd.config.build import make_answering_settings, make_caching_settings, make_settings
from deltakd.io.errors import ConfigError, NonFiniteLossError
from deltakd.io.garbage import nothing_left
from deltakd.io.run_directory import RunDirectory
from deltakd.references import CacheStore
from deltakd.references.fill import in_units
from deltakd.studies.comparison import comparison, finished_rows
from deltakd.studies.display import Stages, stages_on
from deltakd.studies.job_configs import check_jobs, compose_jobs, stages_read_by
from deltakd.studies.study_file import Job, Study
from deltakd.studies.timing import expected_minutes, measured_seconds, say_estimate, say_hours, seconds_of
from deltakd.training.answering import run_answers
from deltakd.training.caching import fill_cache, finished_cache
from deltakd.training.run import run_training

log = logging.getLogger(__name__)


def run_study(study: Study, console: Console, stages: Collection[str] = (), checked: bool = False) -> None:
    """Run all unfinished jobs, then print the study's total time so far and the comparison.

    Args:
        study: the study.
        console: shows estimate, progress and comparison.
        stages: the stages to run; empty: all.
        checked: True if the keys of their overrides have been checked (``check_keys``).

    Raises:
        ConfigError: a config is wrong, or a stage that is not to be run is not finished, though one that is reads it:
            said before the first run starts. Or runs of a stage failed: said at the end, when all stages that do not
            read it have run.
        Stopped: a signal came; the state of the run is saved.
    """
    jobs = study.chosen(stages)
    check_jobs(study, jobs, checked)
    measured = measured_seconds(jobs)
    say_estimate(jobs, measured, console)
    failed: dict[str, str] = {}
    with stages_on(console, study.name, expected_minutes(jobs, measured)) as shown:
        for stage in dict.fromkeys(job.stage.name for job in jobs):
            own = [job for job in jobs if job.stage.name == stage]
            configs = compose_jobs(study, own)
            lost = _read_of(failed, own, configs, study)
            if lost:
                failed[stage] = f"stage {stage} was not run, since it reads {' and '.join(lost)}"
                continue
            problems = _run_stage(own, configs, measured[stage], shown)
            if problems:
                failed[stage] = (
                    f"{len(problems)} of the {len(own)} runs of stage {stage} failed ({'; '.join(problems)}). The "
                    "others are kept, and stages that do not read it have run; the same command tries these again"
                )
    say_hours(study, console)
    if finished_rows(study):
        console.print(comparison(study))
        if study.note is not None:
            console.print(study.note, markup=False, highlight=False)
    if failed:
        raise ConfigError(list(failed.values()))


def _read_of(
    failed: Collection[str], jobs: Sequence[Job], configs: Mapping[str, DictConfig], study: Study
) -> list[str]:
    """Return those of the failed stages that some runs read."""
    if not failed:
        return []
    read = {stage for job in jobs for stage in stages_read_by(job, configs[job.name], study)}
    return [stage for stage in failed if stage in read]


def _run_stage(
    jobs: Sequence[Job], configs: Mapping[str, DictConfig], seconds: list[float], shown: Stages
) -> list[str]:
    """Run the unfinished jobs of a stage.

    Args:
        jobs: all of one stage.
        configs: by name of the run.
        seconds: durations of this stage's runs so far; appended to.
        shown: the display.

    Returns:
        For a stage of several runs, the failed ones, each with the reason.
    """
    problems = []
    for job in jobs:
        finished, started = job.directory.finished, time.perf_counter()
        if not finished:
            shown.start(job.name)
        try:
            # A finished run is only read: its files are there, but they must be those of this config.
            with nothing_left():
                outcome = _RUN[job.stage.command](configs[job.name], job.directory)
        except (ValueError, NonFiniteLossError, MisconfigurationException, torch.OutOfMemoryError) as error:
            if len(jobs) == 1:
                raise
            reason = " ".join(str(error).split())
            problems.append(f"{Path(job.name).name}: {reason}")
            shown.fail(job.name, reason, time.perf_counter() - started)
            continue
        took = seconds_of(job.directory) if finished else time.perf_counter() - started
        shown.finish(job.name, outcome, took, before=finished)
        if not finished:
            seconds.append(took)
            shown.expect(expected_minutes([j for j in jobs if not j.directory.finished], {job.stage.name: seconds}))
    return problems


def _train(cfg: DictConfig, directory: RunDirectory) -> str:
    value = run_training(make_settings(cfg), directory.path)
    return f"{directory.read_summary()['meta']['objective']} = {value:.4g}"


def _generate(cfg: DictConfig, directory: RunDirectory) -> str:
    summary = run_answers(make_answering_settings(cfg), directory.path)
    return f"{summary['answered']} of {summary['prompts']} prompts answered"


def run_caching(cfg: DictConfig) -> dict[str, Any]:
    """Create or complete the cache at ``reference.path``; a complete one is only read.

    Args:
        cfg: composed config (``conf/train.yaml``) with ``reference=cached``.

    Returns:
        The content of its ``summary.json``.

    Raises:
        ConfigError: lists all problems of the config, or its differences from the existing cache.
        ValueError: as ``fill_cache``.
    """
    path = OmegaConf.select(cfg, "reference.path")
    if path and CacheStore.is_at(Path(path)) and not OmegaConf.select(cfg, "reference.remake"):
        settings = make_settings(cfg)
        summary = finished_cache(settings) if settings.cache is not None else None
        if summary is not None:
            log.info("%s is finished already; nothing to do.", path)
            return summary
    return fill_cache(make_caching_settings(cfg))


def _cache(cfg: DictConfig, directory: RunDirectory) -> str:
    summary = run_caching(cfg)
    return f"{summary['rows']} rows, {summary['tokens']} tokens, {in_units(summary['bytes'])}"


#: The commands of stages (study_file.COMMANDS); each returns its outcome in a few words.
_RUN = {"train": _train, "generate": _generate, "cache": _cache}
