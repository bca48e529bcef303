"""Finds run directories and reads them; unreadable parts are reported, never guessed."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from deltakd.evaluation import MAIN_METRICS, METRICS, by_task
from deltakd.io.files import read_json_lines
from deltakd.io.wording import natural

Record = dict[str, Any]

#: Folders that hold no runs.
_NOT_RUNS = {"wandb", "checkpoints", "student", "tokenizer", "generations", "tensorboard"}


@dataclass(frozen=True)
class Run:
    """The contents of a run directory.

    Args:
        path: the directory.
        config: its ``config.yaml``.
        summary: its ``summary.json``; None: the run is not finished.
        metrics: its ``metrics.csv``, one row per logging; empty if there is none.
        answers: evaluation set -> sampling seed -> scored records, for the sets that the summary names.
        label: its label in a ``study.yaml``.
    """

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any] | None = None
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)
    answers: Mapping[str, Mapping[int, list[Record]]] = field(default_factory=dict)
    label: str | None = None

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def evaluation_only(self) -> bool:
        """True if ``deltakd.evaluate`` made it, so nothing was trained."""
        return "evaluated_model" in self.config

    def has(self, name: str, metric: str) -> bool:
        """True if its answers to the set ``name`` are scored by ``metric``."""
        return any(metric in records[0] for records in self.answers.get(name, {}).values())

    @property
    def seed(self) -> int:
        return int(self.config.get("seed") or 0)

    @property
    def meta(self) -> Mapping[str, Any]:
        """Where the run ran and what it cost; empty unless it is finished."""
        return (self.summary or {}).get("meta", {})

    @property
    def step(self) -> int:
        """The last optimiser step that was logged."""
        if "step" not in self.metrics or self.metrics["step"].dropna().empty:
            return int(self.meta.get("steps") or 0)
        return int(self.metrics["step"].max())

    @property
    def total_steps(self) -> int | None:
        """Optimiser steps of the whole run; None if neither summary nor config says."""
        steps = self.meta.get("steps") or (self.config.get("trainer") or {}).get("max_steps")
        return None if steps is None else int(steps)

    @property
    def last_written(self) -> datetime:
        """When its summary was written, else its metrics, else its config."""
        files = [self.path / name for name in ("summary.json", "metrics.csv", "config.yaml")]
        return datetime.fromtimestamp(next(file for file in files if file.is_file()).stat().st_mtime)

    @cached_property
    def curves(self) -> Mapping[str, pd.Series]:
        """Metric -> its values over optimiser steps (the index)."""
        if "step" not in self.metrics:
            return {}
        by_step = self.metrics.groupby("step").last()
        # A resumed run may have logged a step twice; `last` keeps the newer value.
        return {str(name): by_step[name].dropna() for name in by_step.columns if by_step[name].notna().any()}


@dataclass
class Found:
    """The runs found under the given paths.

    Args:
        runs: in the order given; those of a study in the order of its table.
        skipped: unreadable parts, and stages that a study does not report, one sentence each.
    """

    runs: list[Run] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def find_runs(paths: Sequence[str]) -> Found:
    """Find and read the runs under some paths.

    Args:
        paths: run directories, folders that hold some (a study's outputs, a multirun), folders with a ``study.yaml``,
            or globs of any of them.

    Raises:
        ValueError: names every path that does not exist or holds no run; or no run can be read.
    """
    found = Found()
    chosen: dict[Path, tuple[Path, str | None]] = {}
    problems: list[str] = []
    for given in paths:
        here = [path for match in _matches(given) for path in _run_directories(match, found.skipped)]
        if not here:
            problems.append(_nothing(given))
        for path, label in here:
            # A run may be given twice: itself, and in its study, which has a label for it.
            first, known = chosen.get(path.resolve(), (path, None))
            chosen[path.resolve()] = (first, known or label)
    if problems:
        raise ValueError("\n".join(problems))
    for path, label in chosen.values():
        run = _read_run(path, label, found.skipped)
        if run is not None:
            found.runs.append(run)
    if not found.runs:
        raise ValueError(
            f"Of {len(chosen)} director{'y' if len(chosen) == 1 else 'ies'} with a config.yaml none is a run that "
            "can be reported" + "".join(f"\n  - {reason}" for reason in found.skipped)
        )
    return found


def _matches(given: str) -> list[Path]:
    if glob.has_magic(given) and not Path(given).exists():
        return [Path(match) for match in sorted(glob.glob(given), key=natural)]
    return [Path(given)]


def _nothing(given: str) -> str:
    wanted = "a run directory (config.yaml), a folder of some, or a study's folder (study.yaml)"
    if glob.has_magic(given) and not Path(given).exists():
        return f"{given} matches nothing that holds a run; wanted: {wanted}."
    if not Path(given).exists():
        return f"{given} does not exist; wanted: {wanted}."
    study = Path(given) / "study.yaml"
    if study.is_file():
        return f"{given}: no stage that its study reports has run yet; run `python -m deltakd.study {given}` first."
    return f"{given} holds no run; wanted: {wanted}."


def _run_directories(path: Path, skipped: list[str]) -> list[tuple[Path, str | None]]:
    """Return run directories in and under ``path``, with their study labels; ``skipped`` gets stages left out."""
    if (path / "study.yaml").is_file():
        return _stages(path / "study.yaml", skipped)[0]
    if (path / "config.yaml").is_file():
        return [(path, None)]
    study = Path("experiments") / path.name / "study.yaml"
    if study.is_file() and path.resolve() == (Path("outputs") / path.name).resolve():
        listed, left_out = _stages(study, skipped)
        known = {p.resolve() for p in [*(p for p, _ in listed), *left_out]}
        return listed + [(p, None) for p in _walk(path) if p.resolve() not in known]
    return [(p, None) for p in _walk(path)]


def _walk(path: Path) -> Iterator[Path]:
    for folder, children, files in os.walk(path):
        if "config.yaml" in files:
            children.clear()
            yield Path(folder)
        children[:] = sorted((c for c in children if c not in _NOT_RUNS and not c.startswith(".")), key=natural)


def _stages(file: Path, skipped: list[str]) -> tuple[list[tuple[Path, str | None]], list[Path]]:
    """Return a study's runs, those of its table first and with their labels, and the runs left out.

    Only the table's stages are reported: runs of others, such as a screening, would look like repetitions of the
    finals, since name and seed do not distinguish methods. Models that reported runs learnt from are always shown.

    Raises:
        ValueError: the file is not a study.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        stages = list(content["stages"])
        rows = {stage: label for label, stage in ((content.get("table") or {}).get("rows") or {}).items()}
        folder = Path("outputs") / (content.get("name") or file.resolve().parent.name)
        if not all(isinstance(text, str) for text in (*stages, *rows, *rows.values())):
            raise TypeError("names of stages and rows must be strings; write numbers in quotes")
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a study ({type(error).__name__}: {error}); give its run directories."
        ) from None
    found: list[tuple[Path, str | None]] = []
    for stage, label in rows.items():
        for path in _walk(folder / stage):
            # The runs of a sweep are below their stage.
            name = path.relative_to(folder).as_posix()
            found.append((path, job_label(label, name)))
    others = [(stage, path) for stage in stages if stage not in rows for path in _walk(folder / stage)]
    models = _models_of(path for path, _ in found) if rows else set()
    left_out = [(stage, path) for stage, path in others if rows and os.path.realpath(path / "student") not in models]
    found += [(path, None) for stage, path in others if (stage, path) not in left_out]
    names = dict.fromkeys(stage for stage, path in left_out if _trains(path))
    if names:
        skipped.append(
            f"{folder}: not in the table of its study.yaml, so not in this report: {', '.join(names)} (give their "
            "directories for one of their own)."
        )
    return found, [path for _, path in left_out]


def _models_of(runs: Iterable[Path]) -> set[str]:
    """Return the paths of all models that the runs' configs name."""
    nodes = [node for run in runs for node in ((_config(run) or {}).get("model") or {}).values()]
    paths = [node["path"] for node in nodes if isinstance(node, Mapping) and node.get("path")]
    return {os.path.realpath(str(path)) for path in paths}


def _config(run: Path) -> dict[str, Any] | None:
    """Return the config of a run; None if it can't be read, which `_read_run` reports."""
    try:
        content = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _trains(path: Path) -> bool:
    """Return True for the directory of a run, False for a teacher's answers."""
    return _is_run(_config(path) or {})


def _is_run(config: Mapping[str, Any]) -> bool:
    return "answering_teacher" not in config and "seed" in config


def job_label(label: str, name: str) -> str:
    """Return the label of a study's run; runs of a stage that differ only in their seed share it.

    Args:
        label: label of its stage.
        name: ``<stage>``, or ``<stage>/<key>=<value>,...`` where the stage has several runs.
    """
    varying = name.partition("/")[2]
    kept = re.sub(r"(^|,)seed=\d+(?=,|$)", "", varying).strip(",").replace(",", " ")
    if kept.startswith("loss=") or " loss=" in kept:
        return kept.replace("loss=", "", 1)
    return f"{label} {kept}" if kept else label


def _read_run(path: Path, label: str | None, skipped: list[str]) -> Run | None:
    """Read a run; None if the directory holds no run, or if config or summary are damaged (noted in ``skipped``)."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        skipped.append(f"{path}/config.yaml can't be read ({_first_line(error)}): this run is left out.")
        return None
    if not _is_run(config):
        return None
    summary = None
    if (path / "summary.json").is_file():
        try:
            summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
            if not isinstance(summary, dict) or not isinstance(summary.get("meta"), dict):
                raise ValueError("it holds no results of a run")
        except (OSError, ValueError) as error:
            skipped.append(f"{path}/summary.json can't be read ({_first_line(error)}): this run is left out.")
            return None
    metrics = _tolerantly(path / "metrics.csv", _read_metrics, skipped, "its curves are left out")
    answers = _read_answers(path, config, summary, skipped) if summary else {}
    return Run(path, config, summary, pd.DataFrame() if metrics is None else metrics, answers, label)


def _read_metrics(file: Path) -> pd.DataFrame:
    table = pd.read_csv(file)
    if "step" not in table:
        raise ValueError("it has no column `step`")
    numbers = table.select_dtypes("number")
    if len(numbers.columns) < len(table.columns):
        text = sorted(set(table.columns) - set(numbers.columns))
        raise ValueError(f"columns {text[:3]} are not all numbers")
    return table


def _read_answers(
    path: Path, config: Mapping[str, Any], summary: Mapping[str, Any], skipped: list[str]
) -> dict[str, dict[int, list[Record]]]:
    """Return the scored answers behind the summary's scores; a missing or damaged file drops its whole set."""
    seeds = [int(seed) for seed in (config.get("evaluation") or {}).get("seeds") or []]
    scores = [key.rpartition("/") for key in summary if key.endswith(tuple(f"/{metric}" for metric in MAIN_METRICS))]
    # ``<set>/<task>/<metric>``: the answers are in the set's own file.
    sets = dict.fromkeys(name.partition("/")[0] for name, _, _ in scores if name.partition("/")[0] != "val")
    answers: dict[str, dict[int, list[Record]]] = {}
    for name in sets:
        files = {seed: path / "generations" / f"{name}_seed{seed}.jsonl" for seed in seeds}
        why = f"its scores on {name} are left out"
        by_seed = {seed: _tolerantly(file, _read_records, skipped, why) for seed, file in files.items()}
        missing = [
            str(files[seed]) for seed, records in by_seed.items() if records is None and not files[seed].exists()
        ]
        if missing:
            skipped.append(f"{missing[0]} is missing: {why}.")
        read = {seed: records for seed, records in by_seed.items() if records is not None}
        if read and len(read) == len(files):
            answers[name] = read
            answers |= {f"{name}/{task}": some for task, some in by_task(read).items()}
    return answers


def _read_records(file: Path) -> list[Record]:
    records = read_json_lines(file) or []
    if not records:
        raise ValueError("it is empty")
    needed = {"row_id", "prompt", "reference", "output", "decoding"}
    first = records[0].keys() if isinstance(records[0], dict) else set()
    scores = {metric for metric in METRICS if metric in first}
    for number, record in enumerate(records, 1):
        if not scores or not isinstance(record, dict) or (needed | scores) - record.keys():
            raise ValueError(f"line {number} is not a scored answer")
    return records


def _tolerantly(file: Path, read: Callable[[Path], Any], skipped: list[str], consequence: str) -> Any:
    """Return ``read(file)``; None if the file is absent, or damaged (noted in ``skipped``)."""
    if not file.is_file():
        return None
    try:
        return read(file)
    except (OSError, ValueError, KeyError) as error:
        skipped.append(f"{file} can't be read ({_first_line(error)}): {consequence}.")
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
