"""Measures beyond ROUGE: their names and formats, and a table of them for each set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deltakd.evaluation.text_measures import TEXT_MEASURES, text_measures
from deltakd.results.methods import Method
from deltakd.results.reading import Run

#: Measure in a summary -> heading and decimals.
MEASURES = {
    "perplexity": ("perplexity", 2),
    "perplexity_before": ("perplexity before", 2),
    "fact_recall": ("facts recalled (%)", 2),
    "fact_recall_before": ("facts before (%)", 2),
    "ece": ("ECE (%)", 2),
    "kl_teacher": ("KL to teacher (nats)", 4),
    "span_kl_teacher": ("KL to teacher over spans (nats)", 4),
    "kl_raw_student": ("KL to raw student (nats)", 4),
    "top1_agreement": ("top-1 agreement (%)", 2),
    "shift_correlation": ("shift correlation", 3),
    "distinct_1": ("distinct-1 (%)", 2),
    "distinct_2": ("distinct-2 (%)", 2),
    "distinct_4": ("distinct-4 (%)", 2),
    "length_ratio": ("length ratio", 2),
    "repetition_4": ("repetition-4 (%)", 2),
}
NOTES = (
    "Perplexity, ECE (expected calibration error over 15 bins), both KL, top-1 agreement and shift correlation are of "
    "the tokens of reference answers, teacher-forced and exact over the vocabulary; distinct-n, length ratio (to the "
    "references) and repetition are of the words of generated answers.",
    "KL to the teacher is KL(p_t ‖ π_θ). Over spans, of a teacher with another tokenizer, it is of the next token "
    "where text begins that both cut alike, over the tokens that both have and one bucket for the rest. KL to the raw "
    "student, KL(p_s^raw ‖ π_θ), says how far training moved the student. "
    "Of what is kept, perplexity and KL are of raw text, and a fact is recalled if greedy decoding completes "
    "it; before: by the raw student.",
    "± is one standard error over training seeds; of one seed there is none.",
)


@dataclass(frozen=True)
class BeyondRow:
    """A method with a cell for each column: (mean, standard error over training seeds or "")."""

    method: Method
    cells: list[tuple[str, str]]

    @property
    def label(self) -> str:
        return self.method.label


@dataclass(frozen=True)
class BeyondTable:
    """The measures on one set.

    Args:
        name: name of the set; ``val`` is the runs' own held-out data.
        columns: headings of the measures that some method has.
        rows: references first; methods without any measure are absent.
        note: the amounts of data that the methods were measured on, if they differ; else empty.
    """

    name: str
    columns: list[str]
    rows: list[BeyondRow]
    note: str = ""

    @property
    def title(self) -> str:
        """The set's name in a heading."""
        return set_title(self.name)


def set_title(name: str) -> str:
    """Return a set's name in a heading."""
    return {"val": "held-out rows (val)", "retained": "what is kept (raw text, facts)"}.get(name, name)


def measured_values(method: Method, name: str, measure: str) -> list[float]:
    """Return a measure on a set, for each finished run that has a finite value."""
    values = [(run.summary or {}).get(f"{name}/{measure}") for run in method.finished]
    return [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard error over training seeds; None as the error of a single value."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(np.mean(values)), error


def beyond_tables(methods: Sequence[Method]) -> list[BeyondTable]:
    """Return a table for each set with any measure, held-out rows and their tasks first."""
    figures = {method.label: [_measures_of(run) for run in method.finished] for method in methods}
    names = dict.fromkeys(key.rpartition("/")[0] for of in figures.values() for run in of for key in run)
    return [_table(name, methods, figures) for name in sorted(names, key=lambda name: name.partition("/")[0] != "val")]


def _measures_of(run: Run) -> dict[str, float]:
    """Return ``<set>/<measure>`` of a run; measures of texts that its summary lacks are made from its answers."""
    found: dict[str, float] = {}
    for name, by_seed in run.answers.items():
        if f"{name}/{TEXT_MEASURES[0]}" not in (run.summary or {}):
            found |= {f"{name}/{measure}": value for measure, value in text_measures(by_seed).items()}
    for key, value in (run.summary or {}).items():
        name, _, measure = key.rpartition("/")
        if name and measure in MEASURES and isinstance(value, int | float) and math.isfinite(value):
            found[key] = float(value)
    return found


def _table(name: str, methods: Sequence[Method], figures: Mapping[str, Sequence[Mapping[str, float]]]) -> BeyondTable:
    keys = [m for m in MEASURES if any(f"{name}/{m}" in run for of in figures.values() for run in of)]
    rows = []
    for method in methods:
        values = {m: [run[f"{name}/{m}"] for run in figures[method.label] if f"{name}/{m}" in run] for m in keys}
        if any(values.values()):
            rows.append(BeyondRow(method, [_cell(m, values[m]) for m in keys]))
    return BeyondTable(name, [MEASURES[m][0] for m in keys], rows, _unequal([row.method for row in rows], name))


def _unequal(methods: Sequence[Method], name: str) -> str:
    """Return how much of the set each method was measured on, teacher-forced; empty if all on the same amount."""
    measured: dict[tuple[int, int], dict[str, None]] = {}
    for method in methods:
        for run in method.finished:
            counts = (run.meta.get("measured") or {}).get(name)
            if counts:
                measured.setdefault((counts["rows"], counts["tokens"]), {})[method.label] = None
    if len(measured) < 2:
        return ""
    said = [f"{', '.join(labels)} on {rows:,} rows, {tokens:,} tokens" for (rows, tokens), labels in measured.items()]
    return (
        f"Not all were measured on the same reference answers, so that figures are not comparable: {'; '.join(said)}."
    )


def _cell(measure: str, values: Sequence[float]) -> tuple[str, str]:
    if not values:
        return "–", ""
    digits = MEASURES[measure][1]
    mean, error = mean_and_stderr(values)
    return f"{mean:,.{digits}f}".replace("-", "−"), "" if error is None else f"{error:,.{digits}f}"
