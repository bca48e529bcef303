"""A chain of runs: ``python -m deltakd.study experiments/<name>`` runs the stages of its ``study.yaml`` in order."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from deltakd.evaluation import METRIC_TITLES
from deltakd.runs.answers import run_answers
from deltakd.runs.caching import in_units, run_caching
from deltakd.runs.configuration import compose_config
from deltakd.runs.directory import RunDirectory
from deltakd.runs.errors import ConfigError, guarded
from deltakd.runs.ranks import is_main_process
from deltakd.runs.stage_display import stages_on
from deltakd.runs.training import run_training

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One run of a study.

    Args:
        name: of its directory.
        overrides: Hydra overrides.
        command: ``train``; ``generate``: the teacher's answers, which a later stage trains on; or ``cache``: the
            references' outputs, which later stages read with ``reference=cached reference.path=outputs/...``.
        minutes: how long it is expected to take on two cores, for the estimate; None: unknown.
    """

    name: str
    overrides: list[str]
    command: str = "train"
    minutes: float | None = None


@dataclass(frozen=True)
class Study:
    """What ``study.yaml`` says.

    Args:
        name: outputs go to ``outputs/<name>/<stage>``.
        stages: in the order in which they run.
        overrides: of every stage, before its own.
        rows: label -> stage, the rows of the comparison table.
        columns: metrics, the columns of the table.
    """

    name: str
    stages: list[Stage]
    overrides: list[str] = field(default_factory=list)
    rows: Mapping[str, str] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)

    def directory(self, stage: str) -> RunDirectory:
        """Where a stage goes."""
        return RunDirectory(Path("outputs") / self.name / stage)


def read_study(folder: Path) -> Study:
    """Read ``study.yaml`` of a folder.

    Raises:
        ConfigError: it is absent, or everything that is wrong in it.
    """
    path = folder / "study.yaml"
    if not path.is_file():
        raise ConfigError([f"{path} does not exist; give a folder with a study.yaml, such as experiments/quickstart"])
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    allowed = {"name", "overrides", "stages", "table"}
    problems = [
        f"{path}: unknown key {k!r}; allowed: {', '.join(sorted(allowed))}" for k in content if k not in allowed
    ]
    stages = []
    for name, body in (content.get("stages") or {}).items():
        entry = body or {}
        unknown = set(entry) - {"overrides", "command", "minutes"}
        if unknown:
            problems.append(
                f"{path}: stage {name} has unknown keys {sorted(unknown)}; allowed: overrides, command, minutes"
            )
        command = entry.get("command", "train")
        if command not in COMMANDS:
            problems.append(f"{path}: stage {name} has command {command!r}; allowed: {', '.join(COMMANDS)}")
        stages.append(Stage(name, list(entry.get("overrides", [])), command, entry.get("minutes")))
    table = content.get("table") or {}
    trained = [s.name for s in stages if s.command == "train"]
    rows = table.get("rows") or {name: name for name in trained}
    problems += [
        f"{path}: table row {k!r} is stage {v!r}, which does not exist or trains no model"
        for k, v in rows.items()
        if v not in trained
    ]
    if not stages:
        problems.append(f"{path}: no stages")
    if problems:
        raise ConfigError(problems)
    name = content.get("name", folder.resolve().name)
    return Study(name, stages, list(content.get("overrides") or []), rows, list(table.get("columns") or []))


def run_study(study: Study, console: Console) -> None:
    """Run the stages that are not finished, then print the comparison.

    Raises:
        ConfigError: a stage's config is wrong; all stages are composed before the first runs.
        Stopped: a signal came; the stage's state is saved.
    """
    configs = {stage.name: _compose(study, stage) for stage in study.stages}
    todo = [stage for stage in study.stages if not study.directory(stage.name).finished]
    known = [stage.minutes for stage in todo if stage.minutes is not None]
    if known:
        console.print(f"{len(todo)} of {len(study.stages)} stages to run; about {sum(known):.0f} minutes on two cores.")
    with stages_on(console, study.name, {stage.name: stage.minutes for stage in study.stages}) as stages:
        for stage in study.stages:
            directory = study.directory(stage.name)
            finished, started = directory.finished, time.perf_counter()
            if not finished:
                stages.start(stage.name)
            # A finished stage is only read: its files are there, but they must be those of this config.
            outcome = COMMANDS[stage.command](configs[stage.name], directory)
            seconds = time.perf_counter() - started
            if finished:
                seconds = directory.read_summary().get("meta", {}).get("seconds", 0.0)
            stages.finish(stage.name, outcome, seconds, before=finished)
    console.print(comparison(study))


def _train(cfg: DictConfig, directory: RunDirectory) -> str:
    value = run_training(cfg, directory.path)
    return f"{directory.read_summary()['meta']['objective']} = {value:.4g}"


def _generate(cfg: DictConfig, directory: RunDirectory) -> str:
    summary = run_answers(cfg, directory.path)
    return f"{summary['answered']} of {summary['prompts']} prompts answered"


def _cache(cfg: DictConfig, directory: RunDirectory) -> str:
    summary = run_caching(cfg)
    return f"{summary['rows']} rows, {summary['tokens']} tokens, {in_units(summary['bytes'])}"


#: What a stage may run; each returns its outcome in a few words.
COMMANDS = {"train": _train, "generate": _generate, "cache": _cache}


def _compose(study: Study, stage: Stage) -> DictConfig:
    """The config of a stage; to W&B the stages of a study are one group, unless it names another."""
    cfg = compose_config("train", _overrides(study, stage))
    if cfg.logger and "wandb" in cfg.logger and cfg.logger.wandb.group is None:
        cfg.logger.wandb.group = study.name
    return cfg


def _overrides(study: Study, stage: Stage) -> list[str]:
    """Common overrides, then the stage's; of two for the same key the later one alone (a dict is not merged)."""
    fixed = [f"name={study.name}/{stage.name}", f"run_dir={study.directory(stage.name).path}", "resume=true"]
    if stage.command == "cache":
        fixed += ["reference=cached", f"reference.path={study.directory(stage.name).path}"]
    by_key = {override.split("=", 1)[0]: override for override in [*study.overrides, *stage.overrides, *fixed]}
    return list(by_key.values())


def comparison(study: Study) -> Table:
    """The comparison table, ± one standard error over prompts where there is one."""
    summaries = {label: study.directory(stage).read_summary() for label, stage in study.rows.items()}
    columns = study.columns or sorted(
        {k for s in summaries.values() for k in s if k.rpartition("/")[2] in METRIC_TITLES}
    )
    table = Table(title=study.name, caption="per cent; ± is one standard error over prompts")
    table.add_column("model")
    table.add_column("parameters", justify="right")
    for column in columns:
        table.add_column(column, justify="right")
    for label, summary in summaries.items():
        parameters = summary["meta"]["parameters"]["student"]
        table.add_row(label, f"{parameters:,}", *(_cell(summary, column) for column in columns))
    return table


def _cell(summary: Mapping[str, Any], column: str) -> str:
    if column not in summary:
        return "-"
    error = summary.get(f"{column}_stderr")
    return f"{summary[column]:.2f}" + ("" if error is None else f" ± {error:.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser("deltakd.study", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder that holds study.yaml, such as experiments/quickstart")
    folder = parser.parse_args(argv).folder
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
    guarded(lambda: run_study(read_study(folder), console), f"python -m deltakd.study {folder}")


if __name__ == "__main__":
    main()
