"""Reads and checks ``study.yaml``: stages in order, each a single run or one for every combination of its sweeps."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from deltakd.config.compose import check_overrides
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.io.typed import typed
from deltakd.io.yaml_files import read_yaml

Command = Literal["train", "generate", "cache"]
#: Commands of a stage: a training run, a teacher's answers, a cache of references.
COMMANDS: tuple[str, ...] = get_args(Command)

#: File systems do not accept longer names.
_LONGEST_NAME = 200
#: Choices of a stage that creates a cache, in addition to its own overrides.
_CACHED = "reference=cached"


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
        stage: its stage.
        name: ``<stage>``, or ``<stage>/<key>=<value>,...`` with the settings that vary in the stage.
        directory: its run directory.
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
        jobs: stage -> its runs, in running order.
        rows: label -> stage, the rows of the comparison table.
        columns: metrics, the columns of the table.
        note: what to look at, printed below the table; None: nothing.
    """

    name: str
    jobs: Mapping[str, Sequence[Job]]
    rows: Mapping[str, str] = field(default_factory=dict)
    columns: Sequence[str] = ()
    note: str | None = None

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


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A stage as the file has it; see :class:`Stage`."""

    overrides: Sequence[str] = ()
    command: Command = "train"
    minutes: Annotated[float, Ge(0)] | None = None


@dataclass(frozen=True, kw_only=True)
class _Table:
    """``table`` as the file has it; see :class:`Study`."""

    rows: Mapping[str, str] = field(default_factory=dict)
    columns: Sequence[str] = ()
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class _File:
    """The file, with its stages not yet parsed."""

    name: str | None = None
    overrides: Sequence[str] = ()
    stages: Mapping[str, Any] = field(default_factory=dict)
    table: _Table = field(default_factory=_Table)


def read_study(folder: Path) -> Study:
    """Read ``study.yaml`` of a folder.

    Raises:
        ConfigError: it is absent or not YAML; or lists all problems in it.
    """
    path = folder / "study.yaml"
    if not path.is_file():
        raise ConfigError([f"{path} does not exist; give a folder with a study.yaml, such as experiments/quickstart"])
    content = read_yaml(path)
    if content is None:
        raise ConfigError([f"{path} is empty; give it stages: {{first: {{overrides: [experiment=quickstart]}}}}"])
    problems: list[str] = []
    read = _read(path, content, problems)
    name = read.name or folder.resolve().name
    problems += _name_problems(name, "name", allowed_slash=True)
    stages = [stage for key, body in read.stages.items() if (stage := _stage(key, body, read, problems))]
    trained = [stage.name for stage in stages if stage.command == "train"]
    rows = dict(read.table.rows) or {stage: stage for stage in trained}
    # A stage with a problem may well be a training stage.
    known = {*trained, *(set(read.stages) - {stage.name for stage in stages})}
    problems += [
        f"table.rows.{label} is stage {stage!r}, which does not exist or trains no model"
        for label, stage in rows.items()
        if stage not in known
    ]
    if not read.stages and not any(problem.startswith("stages") for problem in problems):
        problems.append("no stages; give stages: {first: {overrides: [experiment=quickstart]}}")
    jobs: dict[str, list[Job]] = {}
    for each in stages:
        try:
            jobs[each.name] = _jobs(name, each)
        except ConfigError as error:
            problems += [f"stage {each.name}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return Study(name, jobs, rows, list(read.table.columns), read.table.note)


def _read(path: Path, content: Any, problems: list[str]) -> _File:
    """Check everything but the stages; null means nothing.

    Raises:
        ConfigError: it is not a mapping.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(
            [f"{path} holds {content!r:.80}; it must be a mapping with {', '.join(one.name for one in fields(_File))}"]
        )
    given = _given(content)
    found: list[str] = []
    given = given | {key: _with_text_names(given[key], key, problems) for key in ("stages",) if key in given}
    if isinstance(given.get("table"), Mapping):
        table = _given(given["table"])
        rows = {"rows": _with_text_names(table["rows"], "table.rows", problems)} if "rows" in table else {}
        given["table"] = table | rows
    # `typed` names config keys with their group; a file's own keys have none.
    read = typed(_File, given, "study.yaml", found)
    assert read is not None, "every field has a default"
    problems += [
        _for_yaml(problem.removeprefix("study.yaml.").replace("study.yaml has no key", "unknown key"))
        for problem in found
    ]
    return read


def _given(node: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in node.items() if value is not None}


def _with_text_names(node: Any, key: str, problems: list[str]) -> Any:
    """Return a mapping with texts as keys; others become problems, and their values can still be checked."""
    if not isinstance(node, Mapping):
        return node
    problems += [
        f"{key} has the name {name!r}, which YAML reads as {type(name).__name__}; write it in quotes"
        for name in node
        if not isinstance(name, str)
    ]
    return {str(name): value for name, value in node.items()}


def _stage(name: str, body: Any, read: _File, problems: list[str]) -> Stage | None:
    """Check one stage; return None if it is invalid."""
    key = f"stages.{name}"
    found = _name_problems(name, key, allowed_slash=False)
    given = _given(body) if isinstance(body, Mapping) else {} if body is None else body
    entry = typed(_Entry, given, key, found)
    problems += map(_for_yaml, found)
    if entry is None or found:
        return None
    return Stage(name, (*read.overrides, *entry.overrides), entry.command, entry.minutes)


def _for_yaml(problem: str) -> str:
    """Phrase the remedy for a file: an override is a list entry, and digits are quoted text."""
    said = problem.partition("; to give these digits as text")[0]
    if said != problem:
        return f"{said}; to give these digits as text, write them in quotes"
    if re.match(r"(stages\..*\.)?overrides is ", said):
        return f"{said}; write each override as text: [loss=sft, 'seed=1,2'], with = and without a blank after it"
    if said.startswith("stages is "):
        return f"{said} of names: stages: {{first: {{overrides: [experiment=quickstart]}}}}"
    if re.match(r"table\.(rows|columns) is ", said):
        return f"{said}; they are strings: write numbers, true, no, ... in quotes"
    return said


def _name_problems(name: str, key: str, allowed_slash: bool) -> list[str]:
    """Check a name, which becomes a directory and is quoted in overrides."""
    parts = name.split("/") if allowed_slash else [name]
    if all(re.fullmatch(r"[^/'\"\\$\x00-\x1f]+", part) and part not in (".", "..") for part in parts):
        return []
    return [f"{key}: {name!r} can't be the name of a directory under outputs; give letters, digits, _ and -"]


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
            fixed += [_CACHED, f"reference.path='{directory.path}'"]
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
    """Return the overrides, with only the last one for each key (a dict is not merged)."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError([" ".join(str(error).split())]) from None
    return list({override.get_key_element().lstrip("+"): override for override in parsed}.values())


def _values(override: Override) -> list[str]:
    """Return an override unchanged, or one for each value of its sweep."""
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
    """Return ``key=value,key=value`` in characters that a path allows."""
    plain = (given.replace("'", "").replace('"', "") for given in varying)
    return ",".join(re.sub(r"[^\w.=+-]+", "_", given) for given in plain)


def check_keys(jobs: Sequence[Job]) -> None:
    """Check the keys and choices of all stages, without importing any model.

    Raises:
        ConfigError: every unknown key or choice, with its stage and the nearest one.
    """
    first = {job.stage.name: job for job in reversed(jobs)}
    problems: list[str] = []
    for stage, job in reversed(first.items()):
        try:
            # A cache's choice of references comes first: its other overrides are keys of it.
            chosen = [_CACHED] if job.stage.command == "cache" else []
            check_overrides("train", [*chosen, *job.stage.overrides])
        except ConfigError as error:
            problems += [f"stage {stage}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)


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
