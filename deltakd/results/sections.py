"""The parts of a report besides its tables of scores: runs, answers, and the token view."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltakd.evaluation import METRIC_TITLES, main_metric
from deltakd.evaluation.token_groups import Group, Preservation, ViewedRow
from deltakd.results.beyond import MEASURES
from deltakd.results.figures import mean_and_error
from deltakd.results.methods import Method, row_ids
from deltakd.results.reading import Run

#: Number of prompts of each set shown with all answers.
EXAMPLES = 3
#: Maximum characters of a prompt in a title.
_TITLE = 90


def settings_of(methods: Sequence[Method]) -> list[tuple[str, list[str]]]:
    """Return (label, ``key=value`` of each setting) of the methods whose label does not show how they differ."""
    return [
        (method.label, [f"{key}={value}" for key, value in method.settings.items()])
        for method in methods
        if method.settings
    ]


#: Columns of the table of shift preservation: factor and decimals, as in the tables of the summaries' measures.
_PRESERVED = {
    "correlation": (1, MEASURES["shift_correlation"][1]),
    "kl_teacher": (1, MEASURES["kl_teacher"][1]),
    "kl_raw": (1, MEASURES["kl_teacher"][1]),
    "top1_agreement": (100, MEASURES["top1_agreement"][1]),
}


@dataclass(frozen=True)
class PreservedRow:
    """Shift preservation of a method over all tokens, or those of a task: (mean, standard error or "") per measure."""

    label: str
    task: str | None
    cells: list[tuple[str, str]]
    tokens: int
    rows: int


def preserved_rows(measured: Mapping[str, Sequence[Preservation]]) -> list[PreservedRow]:
    """Return one row for each method, and one for each of its tasks if there are several."""
    found = []
    for label, runs in measured.items():
        overall = [{"all": run.overall} for run in runs if run.overall is not None]
        found.append(_preserved_row(label, None, overall, "all"))
        tasks = dict.fromkeys(task for run in runs for task in run.by_task)
        found += [
            _preserved_row(label, task, [run.by_task for run in runs if task in run.by_task], task) for task in tasks
        ]
    return found


def _preserved_row(label: str, task: str | None, runs: Sequence[Mapping[str, Group]], name: str) -> PreservedRow:
    cells = []
    for measure, (scale, digits) in _PRESERVED.items():
        mean, error = mean_and_error(runs, name, measure)
        text = "–" if math.isnan(mean) else f"{mean * scale:.{digits}f}".replace("-", "−")
        cells.append((text, "" if math.isnan(error) else f"{error * scale:.{digits}f}"))
    return PreservedRow(label, task, cells, sum(run[name].tokens for run in runs), max(run[name].rows for run in runs))


def token_view(measured: Mapping[str, Sequence[Preservation]]) -> dict[str, Any] | None:
    """Return data for the page's script: the rows of one run per method, and the end of the colour scale in nats."""
    views = {label: next((run.token_view for run in runs if run.token_view), []) for label, runs in measured.items()}
    views = {label: rows for label, rows in views.items() if rows}
    if not views:
        return None
    tokens = [token for rows in views.values() for row in rows for token in row.tokens]
    shifts = [abs(s) for token in tokens for s in (token.teacher_shift, token.student_shift) if s is not None]
    # Rare tokens have the largest shifts; a scale that includes them would make all others look alike.
    scale = max(1, math.ceil(float(np.percentile(shifts, 95)))) if shifts else 1
    shown = [{"label": label, "rows": [_viewed(row) for row in rows]} for label, rows in views.items()]
    return {"scale": scale, "views": shown}


def _viewed(row: ViewedRow) -> dict[str, Any]:
    tokens = [
        {
            "text": token.text,
            "teacher": _rounded(token.teacher_shift),
            "student": _rounded(token.student_shift),
            "correlation": _rounded(token.correlation),
            "candidates": {role: [[text, round(p, 4)] for text, p in of] for role, of in token.candidates.items()},
        }
        for token in row.tokens
    ]
    return {"row_id": row.row_id, "title": title_of(row.prompt), "prompt": row.prompt, "tokens": tokens}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


@dataclass(frozen=True)
class Answer:
    """An answer of a method's model, with the name of its main score (such as ROUGE-L) and the score in per cent."""

    label: str
    text: str
    score_name: str
    score: float


@dataclass(frozen=True)
class Example:
    """A prompt with its references and every method's answer."""

    row_id: int
    title: str
    prompt: str
    references: list[str]
    answers: list[Answer]


def examples(methods: Sequence[Method]) -> dict[str, list[Example]]:
    """Return set -> a few evenly spaced prompts, with the answers of each method's first run and sampling seed."""
    names = dict.fromkeys(name for method in methods for run in method.finished for name in run.answers)
    return {name: _examples_of(name, [m for m in methods if m.evaluated(name)]) for name in names}


def _examples_of(name: str, methods: Sequence[Method]) -> list[Example]:
    answers = {method.label: _by_row(method.evaluated(name)[0], name) for method in methods}
    rows = row_ids(methods[0].evaluated(name)[0], name)
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).round().astype(int))
    found = []
    for row in (rows[at] for at in chosen):
        record = answers[methods[0].label][row]
        given = [_answer(label, by[row]) for label, by in answers.items() if row in by]
        found.append(Example(row, title_of(record["prompt"]), record["prompt"], list(record["reference"]), given))
    return found


def _answer(label: str, record: Mapping[str, Any]) -> Answer:
    metric = main_metric(record)
    return Answer(label, record["output"], METRIC_TITLES[metric], record[metric])


def _by_row(run: Run, name: str) -> dict[int, dict[str, Any]]:
    _, records = min(run.answers[name].items())
    return {record["row_id"]: record for record in records}


def title_of(prompt: str) -> str:
    """Return a line that distinguishes prompts: the second that is not a ``###`` heading, else the first, shortened."""
    lines = [line.strip() for line in prompt.splitlines() if line.strip() and not line.startswith("###")]
    # Templates open with the same sentence in every row.
    line = next(iter(lines[1:]), lines[0] if lines else "(empty prompt)")
    return line if len(line) <= _TITLE else line[: _TITLE - 1].rstrip() + "…"


@dataclass(frozen=True)
class RunRow:
    """Where a run ran, and from which commit."""

    path: str
    method: str
    seed: int
    state: str
    commit: str
    machine: str


def run_rows(methods: Sequence[Method]) -> list[RunRow]:
    return [_run_row(method, run) for method in methods for run in method.runs]


def _run_row(method: Method, run: Run) -> RunRow:
    commit, version = run.meta.get("git_commit"), run.meta.get("packages", {}).get("deltakd")
    if commit:
        shown = commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")
    else:
        # Installed, not a checkout.
        shown = f"deltakd {version}" if version else "–"
    machine = ", ".join(str(run.meta[key]) for key in ("machine", "device") if run.meta.get(key)) or "–"
    return RunRow(str(run.path), method.label, run.seed, state_of(run), shown, machine)


def state_of(run: Run) -> str:
    """Return ``finished 2026-11-22 07:20``, or the run's progress."""
    when = f"{run.last_written:%Y-%m-%d %H:%M}"
    if run.finished:
        return f"finished {when}"
    total = f" of {run.total_steps}" if run.total_steps else ""
    return f"unfinished: step {run.step}{total}, last written {when}"


def study_commands(methods: Sequence[Method]) -> list[str]:
    """Return the commands that repeat whole studies whose folders exist."""
    runs = [run for method in methods for run in method.runs]
    studies = dict.fromkeys(str(run.config.get("name") or "").partition("/")[0] for run in runs)
    folders = [Path("experiments") / study for study in studies if study]
    return [f"python -m deltakd.study {folder}" for folder in folders if (folder / "study.yaml").is_file()]


def run_commands(methods: Sequence[Method]) -> list[str]:
    """Return the command that repeats each training run, in a directory next to it."""
    trained = [run for method in methods for run in method.runs if not run.evaluation_only]
    return [
        f"python -m deltakd.train --config-dir {shlex.quote(str(run.path))} --config-name config "
        f"run_dir={shlex.quote(f'{run.path}_again')}"
        for run in trained
    ]


def versions(methods: Sequence[Method]) -> list[tuple[str, list[str]]]:
    """Return groups of methods with the same package versions, and these versions."""
    groups: dict[tuple[str, ...], dict[str, None]] = {}
    for method in methods:
        for run in method.finished:
            packages = run.meta.get("packages") or {}
            key = tuple(f"{name} {version}" for name, version in packages.items() if version)
            groups.setdefault(key, {})[method.label] = None
    return [(", ".join(labels), list(packages)) for packages, labels in groups.items()]
