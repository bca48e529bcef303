"""List run directories with state, settings and scores; filter and sort them, and compare two configs."""

from __future__ import annotations

import csv
import difflib
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from deltakd.config.loss_names import KnownLosses, delta_weight_keys, flat, known_losses, loss_name
from deltakd.evaluation import MAIN_METRICS, METRICS
from deltakd.io.errors import ConfigError
from deltakd.io.progress import read_total_steps
from deltakd.io.run_directory import RunDirectory
from deltakd.io.wording import natural

FINISHED = "finished"
#: Folders of other programs to skip; runs are not nested.
_SKIPPED = ("wandb", "checkpoints")
_COLUMNS = ("run", "state", "date", "loss", "delta_weight", "seed", "student", "seconds")
#: Columns dropped on a narrow terminal, in this order; between the two go all scores but the first, last one first.
_FIRST_TO_GO = ("student", "date")
_LAST_TO_GO = ("seconds", "seed", "delta_weight")
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
_CONDITION = re.compile(r"\s*([^<>=!\s]+)\s*(>=|<=|!=|>|<|=)\s*(.*?)\s*")


@dataclass(frozen=True)
class Entry:
    """One run directory.

    Args:
        path: the directory.
        columns: the values to show: ``state``, ``date``, ``loss`` and so on, and the scores by name.
        config: the run's config with dotted keys.
        corrupt: the unreadable part, or None.
    """

    path: Path
    columns: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    corrupt: str | None = None

    def value(self, key: str) -> Any:
        """Return the value of a column, or else of a config key; None if the run has neither."""
        return self.columns[key] if key in self.columns else self.config.get(key)


def find_entries(folders: Sequence[Path]) -> list[Entry]:
    """Return all run directories in and under some folders, in the natural order of their paths.

    Raises:
        ConfigError: names the folders that do not exist.
    """
    missing = [f"{folder} does not exist; give a folder that holds runs" for folder in folders if not folder.is_dir()]
    if missing:
        raise ConfigError(missing)
    known = known_losses()
    paths = {path: None for folder in folders for path in _run_directories(folder)}
    return [read_entry(path, known) for path in sorted(paths, key=natural)]


def _run_directories(folder: Path) -> Iterable[Path]:
    for place, below, files in os.walk(folder):
        if "config.yaml" in files:
            below.clear()
            yield Path(place)
        below[:] = [name for name in below if name not in _SKIPPED and not name.startswith(".")]


def read_entry(path: Path, known: KnownLosses) -> Entry:
    """Read one run directory; damage is noted in the entry instead of raising."""
    run = RunDirectory(path)
    columns: dict[str, Any] = {"run": str(path), "date": _date(run)}
    try:
        config = _mapping(yaml.safe_load(run.config.read_text(encoding="utf-8")), run.config)
        columns |= _settings(config, known)
        if run.finished:
            return Entry(path, columns | {"state": FINISHED} | _results(run), flat(config))
        return Entry(path, columns | {"state": _progress(run)}, flat(config))
    except (OSError, ValueError, yaml.YAMLError, csv.Error) as error:
        what = _corrupt(run, error)
        return Entry(path, columns | {"state": f"corrupt: {what}"}, corrupt=what)


def _mapping(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a mapping")
    return content


def _corrupt(run: RunDirectory, error: Exception) -> str:
    """Return, in a few words, which file is damaged, and how."""
    if isinstance(error, json.JSONDecodeError):
        return f"{run.summary.name}, line {error.lineno}: {error.msg}"
    if isinstance(error, yaml.YAMLError):
        return f"{run.config.name} is not YAML"
    return " ".join(str(error).split())[:100]


def _settings(config: Mapping[str, Any], known: KnownLosses) -> dict[str, Any]:
    if "answering_teacher" in config or "evaluated_model" in config:
        kind = "answers" if "answering_teacher" in config else "evaluation"
        return {"loss": f"({kind})", "delta_weight": None, "seed": config.get("seed"), "student": None}
    loss = config.get("loss") or {}
    student = (config.get("model") or {}).get("student") or {}
    return {
        "loss": loss_name(loss, known),
        # The key is in every config; only some losses read it.
        "delta_weight": config.get("delta_weight") if delta_weight_keys(loss, known) else None,
        "seed": config.get("seed"),
        "student": _short(student.get("path")),
    }


def _short(path: str | None) -> str:
    """Return a hub name unchanged; for a directory its name, or its run's name if it is ``student``."""
    if path is None:
        return "from scratch"
    place = Path(path)
    if place.name == "student":
        return place.parent.name
    return place.name if place.is_absolute() or len(place.parts) > 2 else path


def _results(run: RunDirectory) -> dict[str, Any]:
    summary = _mapping(run.read_summary(), run.summary)
    if not isinstance(summary.get("meta"), dict):
        raise ValueError(f"{run.summary.name} holds no results of a run")
    meta = {name: value for name, value in summary["meta"].items() if isinstance(value, int | float | str)}
    return {name: value for name, value in summary.items() if name != "meta"} | meta


def _progress(run: RunDirectory) -> str:
    total = read_total_steps(run.path)
    metrics = run.path / "metrics.csv"
    step = 0
    if metrics.is_file():
        with metrics.open(newline="", encoding="utf-8") as file:
            step = max((int(row["step"]) for row in csv.DictReader(file) if row.get("step")), default=0)
    return f"step {step}" + (f" of {total}" if total else "")


def _date(run: RunDirectory) -> str:
    """Return when the run ended, or last wrote something."""
    files = [p for p in (run.summary, run.path / "metrics.csv", run.config) if p.is_file()]
    return f"{datetime.fromtimestamp(files[0].stat().st_mtime):%Y-%m-%d %H:%M}"


def select(entries: Sequence[Entry], conditions: Sequence[str]) -> list[Entry]:
    """Return the entries that meet all conditions ``key=value``, ``!=``, ``>``, ``<``, ``>=``, ``<=``.

    Keys are columns (``state``, ``loss``, ``val/rougeL``) or config keys (``optim.lr``). Text may contain ``*``. A run
    without the value meets only ``key=null``.

    Raises:
        ConfigError: malformed conditions, and keys that no run has, each with the nearest known key.
    """
    parsed, problems = [], []
    for condition in conditions:
        found = _CONDITION.fullmatch(condition)
        if found is None:
            problems.append(f"--filter {condition!r}: give key=value, or one of != > < >= <= in place of =")
        else:
            parsed.append(found.groups())
    problems += unknown_keys(entries, [key for key, _, _ in parsed], "--filter")
    if problems:
        raise ConfigError(problems)
    return [e for e in entries if all(_meets(e.value(key), sign, text) for key, sign, text in parsed)]


def unknown_keys(entries: Sequence[Entry], keys: Sequence[str], option: str) -> list[str]:
    """Return one sentence for each key that no run has, with the nearest known key."""
    known = {key: None for entry in entries for key in (*entry.columns, *entry.config)}
    problems = []
    for key in dict.fromkeys(keys):
        if entries and key not in known and key not in _COLUMNS:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; the nearest one is {near[0]!r}" if near else ""
            problems.append(f"{option}: no run has {key!r}{hint}")
    return problems


def _meets(value: Any, sign: str, text: str) -> bool:
    wanted = _parsed(text)
    if value is None:
        return sign == "=" and wanted is None
    if _is_number(value) and _is_number(wanted):
        return _COMPARISONS[sign](value, wanted)
    if sign in ("=", "!="):
        return fnmatchcase(str(value), text) == (sign == "=") or (sign == "=" and value == wanted)
    # Texts such as dates and names are ordered, too; a number and a text are not.
    return not _is_number(value) and not _is_number(wanted) and _COMPARISONS[sign](str(value), text)


def _parsed(text: str) -> Any:
    """Return a number, true, false or None if the text looks like one, else the text: YAML would convert more."""
    if text.lower() in ("true", "false", "null", "none"):
        return {"true": True, "false": False}.get(text.lower())
    try:
        return float(text)
    except ValueError:
        return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def ordered(entries: Sequence[Entry], key: str, ascending: bool) -> list[Entry]:
    """Return the entries sorted by a key: numbers from high to low (or ascending), then text, then runs without it.

    Raises:
        ConfigError: no run has that key.
    """
    problems = unknown_keys(entries, [key], "--sort")
    if problems:
        raise ConfigError(problems)
    numbers = [e for e in entries if _is_number(e.value(key))]
    texts = [e for e in entries if e.value(key) is not None and not _is_number(e.value(key))]
    without = [e for e in entries if e.value(key) is None]
    by_number = sorted(numbers, key=lambda e: e.value(key), reverse=not ascending)
    return by_number + sorted(texts, key=lambda e: str(e.value(key))) + without


def best_of(entries: Sequence[Entry], keys: Sequence[str], score: str) -> list[Entry]:
    """Return the first of the runs that share the values of ``keys``; runs without the score are left out."""
    first: dict[tuple[str, ...], Entry] = {}
    for entry in entries:
        if entry.value(score) is not None:
            first.setdefault(tuple(str(entry.value(key)) for key in keys), entry)
    return list(first.values())


def default_columns(entries: Sequence[Entry]) -> list[str]:
    """Return settings, then the main scores on validation data and on every evaluation set, then the cost."""
    endings = tuple(f"/{metric}" for metric in MAIN_METRICS)
    scores = {name: None for entry in entries for name in entry.columns if name.endswith(endings)}
    return [*_COLUMNS[:-1], *sorted(scores, key=lambda name: not name.startswith("val/")), _COLUMNS[-1]]


def make_table(entries: Sequence[Entry], columns: Sequence[str], console: Console, fixed: bool = False) -> Table:
    """Return the list as a table.

    Args:
        entries: the rows.
        columns: the columns; ``run`` is the path.
        console: where to show it; columns that do not fit are dropped, and the caption names them.
        fixed: keep all columns, wrapped if need be.
    """
    kept = list(columns)
    scores = [name for name in kept if "/" in name]
    giving_way = [name for name in (*_FIRST_TO_GO, *scores[:0:-1], *_LAST_TO_GO) if name in kept]
    table = _table(entries, kept, [])
    while not fixed and giving_way and _width(table, console) > console.width:
        kept.remove(giving_way.pop(0))
        table = _table(entries, kept, [name for name in columns if name not in kept])
    return table


def _width(table: Table, console: Console) -> int:
    """Return the width of the table with nothing wrapped, in characters."""
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _table(entries: Sequence[Entry], columns: Sequence[str], left_out: Sequence[str]) -> Table:
    caption = f"no room for: {', '.join(left_out)} (--columns ... chooses)" if left_out else None
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    for name in columns:
        numeric = any(_is_number(entry.value(name)) for entry in entries)
        table.add_column(
            name,
            justify="right" if numeric else "left",
            # Only these columns may wrap.
            no_wrap=name not in ("run", "state", "loss", "student"),
            overflow="fold",
            min_width=8,
            max_width=24 if name in ("state", "loss", "student") else None,
        )
    for entry in entries:
        style = "red" if entry.corrupt else None if entry.columns["state"] == FINISHED else "yellow"
        table.add_row(*(_shown(entry, name) for name in columns), style=style)
    return table


def _shown(entry: Entry, name: str) -> str:
    value = entry.value(name)
    if value is None:
        return ""
    if isinstance(value, float):
        error = entry.columns.get(f"{name}_stderr")
        is_score = name.rpartition("/")[2] in METRICS
        digits = f"{value:.2f}" if is_score else f"{value:.4g}"
        if name == "seconds":
            digits = f"{value:.0f}"
        return digits + (f" ± {error:.2f}" if error is not None else "")
    return str(value)


def differences(a: Path, b: Path) -> list[tuple[str, Any, Any]]:
    """Return (key, value in a, value in b) wherever two configs differ; a missing key counts as None.

    Args:
        a, b: run directories, or config files.

    Raises:
        ConfigError: names the configs that can't be read.
    """
    problems: list[str] = []
    first, second = (_read_config(path, problems) for path in (a, b))
    if problems:
        raise ConfigError(problems)
    keys = {**first, **second}
    return [(key, first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)]


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file():
        problems.append(f"{file} does not exist; give a run directory or its config.yaml")
        return {}
    try:
        return flat(_mapping(yaml.safe_load(file.read_text(encoding="utf-8")), file))
    except (ValueError, yaml.YAMLError) as error:
        problems.append(f"{file} is not a config ({' '.join(str(error).split())[:100]})")
        return {}
