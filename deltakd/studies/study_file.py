"""``study.yaml`` read and checked: stages in order, each one run, or one for every combination of its sweeps."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory

#: What a stage may run: a training run, a teacher's answers, a cache of references.
COMMANDS = ("train", "generate", "cache")

_KEYS = ("name", "overrides", "stages", "table")
_STAGE_KEYS = ("overrides", "command", "minutes")
#: File systems do not take longer names.
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Stage:
    """One entry of a study: a run, or a set of runs if its overrides contain sweeps.

    Args:
        name: of its directory.
        overrides: Hydra overrides, those of the study first; ``loss=sft,kd seed=0,1`` are four runs, as in a multirun.
        command: ``train``; ``generate``: the teacher's answers, which a later stage trains on; or ``cache``: the
            references' outputs, which later stages read with ``reference=cached reference.path=outputs/...``.
        minutes: expected minutes of one of its runs, for the estimate; None: unknown.
    """

    name: str
    overrides: tuple[str, ...] = ()
    command: str = "train"
    minutes: float | None = None


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Args:
        stage: where it comes from.
        name: ``<stage>``, or ``<stage>/<key>=<value>,...`` with what varies in the stage.
        directory: where it goes.
        overrides: Hydra overrides without sweeps.
    """

    stage: Stage
    name: str
    directory: RunDirectory
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """The contents of ``study.yaml``.

    Args:
        name: outputs go to ``outputs/<name>/<stage>``.
        jobs: stage -> its runs, in the order in which they run.
        rows: label -> stage, the rows of the comparison table.
        columns: metrics, the columns of the table.
    """

    name: str
    jobs: Mapping[str, Sequence[Job]]
    rows: Mapping[str, str] = field(default_factory=dict)
    columns: Sequence[str] = ()

    def chosen(self, stages: Collection[str]) -> list[Job]:
        """Return the runs of some stages, in the study's order; of all stages if none is named.

        Raises:
            ConfigError: stages that do not exist, with the nearest ones.
        """
        problems = []
        for name in stages:
            if name not in self.jobs:
                near = difflib.get_close_matches(name, self.jobs, n=1, cutoff=0.4)
                hint = f"the nearest is {near[0]!r}; " if near else ""
                problems.append(f"--stages {name}: there is no such stage; {hint}allowed: {', '.join(self.jobs)}")
        if problems:
            raise ConfigError(problems)
        return [job for name, jobs in self.jobs.items() if not stages or name in stages for job in jobs]


def read_study(folder: Path) -> Study:
    """Read ``study.yaml`` of a folder.

    Raises:
        ConfigError: it is absent, or has problems; all are listed.
    """
    path = folder / "study.yaml"
    if not path.is_file():
        raise ConfigError([f"{path} does not exist; give a folder with a study.yaml, such as experiments/quickstart"])
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    problems = [f"{path}: unknown key {k!r}; allowed: {', '.join(sorted(_KEYS))}" for k in content if k not in _KEYS]
    name = content.get("name", folder.resolve().name)
    stages = []
    for stage, body in (content.get("stages") or {}).items():
        entry = body or {}
        unknown = sorted(set(entry) - set(_STAGE_KEYS))
        if unknown:
            problems.append(f"{path}: stage {stage} has unknown keys {unknown}; allowed: {', '.join(_STAGE_KEYS)}")
        command = entry.get("command", "train")
        if command not in COMMANDS:
            problems.append(f"{path}: stage {stage} has command {command!r}; allowed: {', '.join(COMMANDS)}")
        overrides = [*(content.get("overrides") or []), *(entry.get("overrides") or [])]
        stages.append(Stage(str(stage), tuple(overrides), command, entry.get("minutes")))
    table = content.get("table") or {}
    trained = [stage.name for stage in stages if stage.command == "train"]
    rows = table.get("rows") or {stage: stage for stage in trained}
    problems += [
        f"{path}: table row {k!r} is stage {v!r}, which does not exist or trains no model"
        for k, v in rows.items()
        if v not in trained
    ]
    if not stages:
        problems.append(f"{path}: no stages")
    jobs: dict[str, list[Job]] = {}
    for each in stages:
        try:
            jobs[each.name] = _jobs(str(name), each)
        except ConfigError as error:
            problems += [f"{path}: stage {each.name}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return Study(str(name), jobs, rows, list(table.get("columns") or []))


def _jobs(study: str, stage: Stage) -> list[Job]:
    """Return a run for every combination of the stage's sweeps, in the order of Hydra's basic sweeper.

    Raises:
        ConfigError: overrides that Hydra can't read, sweeps that do not list values, or names that can't be told apart.
    """
    parsed = _parsed(stage.overrides)
    if stage.command == "cache" and any(override.is_sweep_override() for override in parsed):
        raise ConfigError(["a cache is one run; give its overrides without sweeps"])
    values = [_values(override) for override in parsed]
    jobs = []
    for combination in itertools.product(*values):
        varying = [given for given, choices in zip(combination, values, strict=True) if len(choices) > 1]
        name = "/".join([stage.name, *([_file_name(varying)] if varying else [])])
        directory = RunDirectory(Path("outputs") / study / name)
        fixed = [f"name='{study}/{name}'", f"run_dir='{directory.path}'", "resume=true"]
        if stage.command == "cache":
            fixed += ["reference=cached", f"reference.path='{directory.path}'"]
        jobs.append(Job(stage, name, directory, _last_of_each([*combination, *fixed])))
    names = [job.name for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    too_long = [name for name in names if len(Path(name).name) > _LONGEST_NAME]
    problems = [f"two runs would be called {name}; give values that differ in letters or digits" for name in twice]
    problems += [f"the name {name} is longer than {_LONGEST_NAME} characters; sweep less at once" for name in too_long]
    if problems:
        raise ConfigError(problems)
    return jobs


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """Return the overrides; of several for the same key, the last one (a dict is not merged)."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError([" ".join(str(error).split())]) from None
    return list({override.get_key_element().lstrip("+"): override for override in parsed}.values())


def _values(override: Override) -> list[str]:
    """Return an override as it is, or one for each value of its sweep."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise ConfigError([f"{override.input_line} names no single values; list them: key=a,b or key=range(0,3)"])
    try:
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except HydraException as error:
        raise ConfigError([f"{override.input_line}: {' '.join(str(error).split())}"]) from None


def _last_of_each(overrides: Sequence[str]) -> tuple[str, ...]:
    return tuple({override.split("=", 1)[0].lstrip("+"): override for override in overrides}.values())


def _file_name(varying: Sequence[str]) -> str:
    """``key=value,key=value`` in letters that a path may have."""
    plain = (given.replace("'", "").replace('"', "") for given in varying)
    return ",".join(re.sub(r"[^\w.=+-]+", "_", given) for given in plain)


def stages_read(config: Any, study: str) -> set[str]:
    """Return the stages of a study whose directories a config names.

    Args:
        config: as plain dicts and lists.
        study: its name.
    """
    if isinstance(config, Mapping):
        return {stage for key, value in config.items() if key != "run_dir" for stage in stages_read(value, study)}
    if isinstance(config, list):
        return {stage for value in config for stage in stages_read(value, study)}
    found = re.match(rf"outputs/{re.escape(study)}/([^/]+)", config) if isinstance(config, str) else None
    return {found[1]} if found else set()
