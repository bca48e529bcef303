"""The table that compares the models of a study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from deltakd.evaluation import METRIC_TITLES
from deltakd.results.beyond import MEASURES
from deltakd.results.reading import job_label
from deltakd.studies.study_file import Study


def comparison(study: Study) -> Table:
    """Return the comparison table of finished runs; runs of a stage that differ only in their seed are one row.

    ± is one standard error: over training seeds if there are several, else over prompts if known.
    """
    summaries = {label: found for label, found in finished_rows(study).items() if found}
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


def finished_rows(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Return label -> the summaries of its finished runs; a stage that varies more than the seed has several rows."""
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
