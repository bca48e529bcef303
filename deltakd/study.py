"""A chain of runs: ``python -m deltakd.study experiments/<name>`` runs the stages of its ``study.yaml`` in order."""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from deltakd.cache import run_caching
from deltakd.config.build import make_answering_settings, make_settings
from deltakd.config.compose import compose_config
from deltakd.distributed.ranks import is_main_process
from deltakd.evaluation import METRIC_TITLES
from deltakd.generate import run_answers
from deltakd.io.errors import ConfigError, guarded
from deltakd.io.run_directory import RunDirectory
from deltakd.references.build import in_units
from deltakd.results.beyond import MEASURES
from deltakd.results.reading import job_label
from deltakd.studies.display import Stages, stages_on
from deltakd.studies.study_file import Job, Study, read_study, stages_read
from deltakd.training.module import NonFiniteLossError
from deltakd.training.run import run_training
from deltakd.types import TEACHER, is_reference_role

log = logging.getLogger(__name__)

USAGE = """Run the stages of a study, one after the other; what is finished is skipped.

  python -m deltakd.study experiments/quickstart
  python -m deltakd.study experiments/dolly_cpu --stages cache screening

A stage whose overrides hold sweeps (loss=sft,kd seed=0,1) is one run for every combination, each in
outputs/<study>/<stage>/<key=value,...>. A run that fails costs no other run of its stage; later stages then wait.
"""


def run_study(study: Study, console: Console, stages: Collection[str] = ()) -> None:
    """Run what is not finished, then print what all of the study took so far and the comparison.

    Args:
        study: what to run.
        console: where estimate, progress and comparison go.
        stages: those to run; empty: all.

    Raises:
        ConfigError: a config is wrong, or a stage that is not to be run is not finished, though one that is reads it:
            all configs are composed before the first run starts. Also at the end of a stage of which runs failed.
        Stopped: a signal came; the state of the run is saved.
    """
    jobs = study.chosen(stages)
    configs = compose_jobs(study, jobs)
    _check_predecessors(study, jobs, configs)
    measured = _measured(jobs)
    _say_estimate(jobs, measured, console)
    with stages_on(console, study.name, _expected(jobs, measured)) as shown:
        for stage in dict.fromkeys(job.stage.name for job in jobs):
            own = [job for job in jobs if job.stage.name == stage]
            problems = _run_stage(own, configs, measured[stage], shown)
            if problems:
                raise ConfigError(
                    [
                        f"{len(problems)} of the {len(own)} runs of stage {stage} failed ({'; '.join(problems)}). The "
                        "others are kept; the same command tries these again, --stages goes on with other stages"
                    ]
                )
    _say_hours(study, console)
    if _rows(study):
        console.print(comparison(study))


def _run_stage(
    jobs: Sequence[Job], configs: Mapping[str, DictConfig], seconds: list[float], shown: Stages
) -> list[str]:
    """Run the jobs of a stage that are not finished.

    Args:
        jobs: all of one stage.
        configs: by name of the run.
        seconds: what runs of this stage took so far; grows.
        shown: the display.

    Returns:
        Of a stage of several runs those that failed, each with the reason.
    """
    problems = []
    for job in jobs:
        finished, started = job.directory.finished, time.perf_counter()
        if not finished:
            shown.start(job.name)
        try:
            # A finished run is only read: its files are there, but they must be those of this config.
            outcome = COMMANDS[job.stage.command](configs[job.name], job.directory)
        except (ValueError, NonFiniteLossError, MisconfigurationException, torch.OutOfMemoryError) as error:
            if len(jobs) == 1:
                raise
            reason = " ".join(str(error).split())
            problems.append(f"{Path(job.name).name}: {reason}")
            shown.fail(job.name, reason, time.perf_counter() - started)
            continue
        took = _seconds(job.directory) if finished else time.perf_counter() - started
        shown.finish(job.name, outcome, took, before=finished)
        if not finished:
            seconds.append(took)
            shown.expect(_expected([j for j in jobs if not j.directory.finished], {job.stage.name: seconds}))
    return problems


def _seconds(directory: RunDirectory) -> float:
    return float(directory.read_summary().get("meta", {}).get("seconds", 0.0))


def _measured(jobs: Sequence[Job]) -> dict[str, list[float]]:
    """Stage -> seconds that its finished runs took."""
    took: dict[str, list[float]] = {job.stage.name: [] for job in jobs}
    for job in jobs:
        if job.directory.finished:
            took[job.stage.name].append(_seconds(job.directory))
    return took


def _expected(jobs: Sequence[Job], measured: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Run -> minutes: what finished runs of its stage took on average, else what the study says."""
    return {
        job.name: statistics.mean(measured[job.stage.name]) / 60 if measured[job.stage.name] else job.stage.minutes
        for job in jobs
    }


def _say_estimate(jobs: Sequence[Job], measured: Mapping[str, Sequence[float]], console: Console) -> None:
    """How long what is left will take, by stage and in all; nothing where nothing is left."""
    todo = [job for job in jobs if not job.directory.finished]
    if not todo:
        return
    expected = _expected(todo, measured)
    known = [minutes for minutes in expected.values() if minutes is not None]
    unknown = len(todo) - len(known)
    total = f"about {sum(known):.0f} minutes" if known else "for how long is not known"
    more = f", {unknown} of them of unknown length" if known and unknown else ""
    lines = [f"{len(todo)} of {len(jobs)} runs to do; {total}{more}."]
    names = list(dict.fromkeys(job.stage.name for job in todo))
    for stage in names if len(names) < len(todo) else ():
        own = [expected[job.name] for job in todo if job.stage.name == stage]
        each = own[0]
        how = "measured" if measured[stage] else "expected"
        time_each = "unknown" if each is None else f"{each * len(own):.0f} minutes ({each:.1f} each, {how})"
        lines.append(f"  {stage}: {len(own)} runs, {time_each}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _say_hours(study: Study, console: Console) -> None:
    """What all finished runs of the study took, whichever start of it ran them, by stage and in all."""
    measured = _measured([job for jobs in study.jobs.values() for job in jobs])
    hours = {stage: sum(seconds) / 3600 for stage, seconds in measured.items() if seconds}
    if not hours:
        return
    lines = ["Hours of finished runs (of one that was interrupted, since its last start alone):"]
    lines += [f"  {stage}: {each:.2f} (runs: {len(measured[stage])})" for stage, each in hours.items()]
    lines.append(f"  in all: {sum(hours.values()):.2f}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _check_predecessors(study: Study, jobs: Sequence[Job], configs: Mapping[str, DictConfig]) -> None:
    """Stages that are read must be finished, or be run now before.

    Raises:
        ConfigError: naming them all.
    """
    waiting: dict[str, set[str]] = {}
    order = list(study.jobs)
    chosen = {job.stage.name for job in jobs}
    for job in jobs:
        for stage in _stages_read(job, configs[job.name], study.name) & set(order) - chosen:
            if not all(other.directory.finished for other in study.jobs[stage]):
                waiting.setdefault(stage, set()).add(job.stage.name)
    if waiting:
        raise ConfigError(
            [
                f"stage {stage} is not finished, and {', '.join(sorted(readers, key=order.index))} reads it; give "
                f"--stages {stage}, too"
                for stage, readers in sorted(waiting.items(), key=lambda item: order.index(item[0]))
            ]
        )


def _stages_read(job: Job, cfg: DictConfig, study: str) -> set[str]:
    """The stages whose files a run opens: data, its student, a cache, or else the references that it loads."""
    parts = {
        key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("data", "model", "evaluation", "reference")
    }
    try:
        requires = instantiate(cfg.loss).requires
    except InstantiationException:
        requires = ()  # the plan of the run says what is wrong
    model: Any = parts["model"]
    reference: Any = parts["reference"]
    if job.stage.command == "generate":
        requires = {TEACHER}
    elif job.stage.command == "train" and "path" in reference:
        requires = ()  # all references are read from there
    unread = {role for role in model if is_reference_role(role) and role not in requires}
    return stages_read(parts | {"model": {k: v for k, v in model.items() if k not in unread}}, study)


def _train(cfg: DictConfig, directory: RunDirectory) -> str:
    value = run_training(make_settings(cfg), directory.path)
    return f"{directory.read_summary()['meta']['objective']} = {value:.4g}"


def _generate(cfg: DictConfig, directory: RunDirectory) -> str:
    summary = run_answers(make_answering_settings(cfg), directory.path)
    return f"{summary['answered']} of {summary['prompts']} prompts answered"


def _cache(cfg: DictConfig, directory: RunDirectory) -> str:
    summary = run_caching(cfg)
    return f"{summary['rows']} rows, {summary['tokens']} tokens, {in_units(summary['bytes'])}"


#: What a stage may run (runs/study_file.py); each returns its outcome in a few words.
COMMANDS = {"train": _train, "generate": _generate, "cache": _cache}


def compose_jobs(study: Study, jobs: Sequence[Job]) -> dict[str, DictConfig]:
    """Run -> its config; to W&B the runs of a study are one group, unless it names another.

    Raises:
        ConfigError: an override has an unknown key or choice; the nearest one is named.
    """
    configs: dict[str, DictConfig] = {}
    seen: set[str] = set()
    for job in jobs:
        # The runs of a stage have the same keys.
        cfg = compose_config("train", job.overrides, checked=job.stage.name in seen)
        seen.add(job.stage.name)
        if cfg.logger and "wandb" in cfg.logger and cfg.logger.wandb.group is None:
            cfg.logger.wandb.group = study.name
        configs[job.name] = cfg
    return configs


def comparison(study: Study) -> Table:
    """The comparison table of what is finished; runs of a stage that differ in their seed alone are one row.

    ± is one standard error: over training seeds where there are several, else over prompts where it is known.
    """
    summaries = {label: found for label, found in _rows(study).items() if found}
    columns = study.columns or sorted(
        {k for found in summaries.values() for s in found for k in s if k.rpartition("/")[2] in METRIC_TITLES}
    )
    several = any(len(found) > 1 for found in summaries.values())
    table = Table(
        title=study.name,
        caption="scores in per cent; ± is one standard error over "
        + ("seeds, or over prompts" if several else "prompts"),
    )
    table.add_column("model")
    table.add_column("parameters", justify="right")
    for name in ["seeds"] * several + list(columns):
        table.add_column(name, justify="right")
    for label, found in summaries.items():
        parameters = found[0]["meta"]["parameters"]["student"]
        seeds = [str(len(found))] if several else []
        table.add_row(label, f"{parameters:,}", *seeds, *(_cell(found, column) for column in columns))
    return table


def _rows(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Label -> the summaries of its finished runs; a stage that varies more than the seed has several rows."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for label, stage in study.rows.items():
        for job in study.jobs[stage]:
            if job.directory.finished:
                rows.setdefault(job_label(label, job.name), []).append(job.directory.read_summary())
    return rows


def _cell(found: Sequence[Mapping[str, Any]], column: str) -> str:
    values = [float(summary[column]) for summary in found if column in summary]
    if not values:
        return "-"
    error = found[0].get(f"{column}_stderr")
    if len(values) > 1:
        error = statistics.stdev(values) / len(values) ** 0.5
    _, digits = MEASURES.get(column.rpartition("/")[2], ("", 2))
    return f"{statistics.mean(values):.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser("deltakd.study", description=USAGE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that holds study.yaml, such as experiments/quickstart")
    parser.add_argument("--stages", nargs="+", default=[], metavar="STAGE", help="run these alone (default: all)")
    given = parser.parse_args(argv)
    folder: Path = given.folder
    # The processes that Lightning starts for further ranks run this same command.
    console = Console(quiet=not is_main_process())
    if console.is_terminal:
        # What is logged goes above the table of stages.
        handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="%X", highlighter=None)
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
        # Rich takes 80 columns for a file, where the table would be cut.
        console = Console(width=140, quiet=console.quiet)
    again = " ".join(["python -m deltakd.study", str(folder), *(["--stages", *given.stages] if given.stages else [])])
    guarded(lambda: run_study(read_study(folder), console, given.stages), again)


if __name__ == "__main__":
    main()
