"""The figures of a report: learning curves, differences, and shift preservation."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from deltakd.evaluation import MAIN_METRICS, METRIC_TITLES
from deltakd.evaluation.token_groups import CLASSES, POSITIONS, Group, Preservation
from deltakd.results.drawing import AXIS, INK, Panel, Plate, Style, in_lines
from deltakd.results.methods import Method
from deltakd.results.tables import Comparison, Score

Styles = Mapping[str, Style]

#: Maximum points of a line; more than a panel has pixels only bloat the page.
_MAX_POINTS = 400
#: Curves with more points are smoothed, with the raw curve faint behind.
_SMOOTHED_ABOVE = 60
#: Letters of a method's name in a line beside its bar.
_NAME = 30
#: Training metrics that are not parts of the loss.
_DIAGNOSTICS = {"loss", "grad_norm", "lr", "padding_fraction", "tokens_per_second", "memory_mib", "delta_weight"}
#: Measures of shift preservation that are drawn, and their titles.
MEASURE_NAMES = {
    "correlation": "Correlation of shifts",
    "kl_teacher": "KL to teacher (nats)",
    "top1_agreement": "Top-1 agreement",
}


def learning_curves(methods: Sequence[Method], styles: Styles) -> Plate:
    """Plot training loss, validation loss and main scores of validation answers over optimiser steps."""
    named = {"train/loss": "Training loss", "val/loss": "Validation loss"}
    named |= {f"val/{metric}": f"Validation {METRIC_TITLES[metric]} (%)" for metric in MAIN_METRICS}
    return Plate(
        _curve_panels(methods, styles, named),
        _legend(methods, styles, [*named]),
        "One line for each run; the runs of a method, one for each seed, share its colour. Losses in nats per token: "
        "methods that minimise different losses are to be compared by the shape of these curves, not by their height. "
        "A faint line is the logged one where a smoothed one (exponentially weighted) is in front of it.",
    )


def loss_parts(methods: Sequence[Method], styles: Styles) -> Plate:
    """Plot the parts of the loss, such as cross-entropy and KL, in training and validation.

    The parts are all training metrics that are not diagnostics.
    """
    logged = dict.fromkeys(name for method in methods for run in method.runs for name in run.curves)
    parts = [name for name in logged if name.startswith("train/") and name.removeprefix("train/") not in _DIAGNOSTICS]
    validated = [name.replace("train/", "val/") for name in parts]
    named = {name: name for name in [*parts, *validated]}
    return Plate(
        _curve_panels(methods, styles, named),
        _legend(methods, styles, parts),
        "Each part before its weight in the loss, in nats per token. Cross-entropy (ce) is the same quantity for all "
        "methods.",
    )


def _curve_panels(methods: Sequence[Method], styles: Styles, named: Mapping[str, str]) -> list[Panel]:
    return [
        Panel(re.sub(r"\W+", "_", metric), title, partial(_draw_curves, methods, styles, metric))
        for metric, title in named.items()
        # What was validated once, at the end, is no curve; the tables have it.
        if any(len(run.curves.get(metric, ())) > 1 for method in methods for run in method.runs)
    ]


def _legend(methods: Sequence[Method], styles: Styles, metrics: Sequence[str]) -> dict[str, Style]:
    return {label: styles[label] for label in _drawn(methods, metrics)}


def _drawn(methods: Sequence[Method], metrics: Sequence[str]) -> list[str]:
    return [m.label for m in methods if any(metric in run.curves for metric in metrics for run in m.runs)]


def _draw_curves(methods: Sequence[Method], styles: Styles, metric: str, axes: Axes) -> None:
    for method in methods:
        style = styles[method.label]
        curves = [run.curves[metric] for run in method.runs if metric in run.curves]
        width = 1.5 if len(method.runs) == 1 else 0.8
        for curve in curves:
            curve = curve[np.isfinite(curve.to_numpy(dtype=float))]
            smooth = len(curve) > _SMOOTHED_ABOVE
            line = curve.ewm(span=max(3.0, len(curve) / 15)).mean() if smooth else curve
            if smooth:
                raw = _thinned(curve)
                axes.plot(raw.index, raw, color=style.color, alpha=0.22, linewidth=0.6)
            line = _thinned(line)
            axes.plot(
                line.index,
                line,
                color=style.color,
                linestyle=style.dash,
                linewidth=width,
                marker="o" if len(line) < 12 else "",
                markersize=2.6,
                label=method.label,
            )
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _thinned(curve: pd.Series) -> pd.Series:
    """Return at most _MAX_POINTS evenly spaced points, with the first and the last."""
    kept = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), _MAX_POINTS)).round().astype(int))
    return curve.iloc[kept]


def differences(tables: Sequence[Comparison], styles: Styles) -> Plate:
    """Plot the paired differences to the baseline with their intervals, one panel for each table and set."""
    panels = []
    for number, table in enumerate(tables, 1):
        for name in table.sets:
            scores = {row.label: row.scores[name] for row in table.rows if name in row.scores}
            compared = {label: score for label, score in scores.items() if score.difference}
            if compared:
                lines = max(in_lines(label, _NAME).count("\n") + 1 for label in compared)
                colors = {row.label: styles[row.method.label].color for row in table.rows if row.label in compared}
                panels.append(
                    Panel(
                        f"difference_{table.metric}_{re.sub(r'[^A-Za-z0-9]+', '_', name)}_{number}",
                        f"{name}: {table.title}, difference to {table.baseline}",
                        partial(_draw_differences, compared, colors),
                        0.75 + max(0.3, 0.15 * lines) * len(compared),
                    )
                )
    return Plate(panels, {}, "Points are differences in percentage points, lines their 95 % intervals.")


def _draw_differences(scores: Mapping[str, Score], colors: Mapping[str, str], axes: Axes) -> None:
    axes.axvline(0, color=AXIS, linewidth=1)
    for at, (label, score) in enumerate(scores.items()):
        difference = score.difference
        assert difference is not None
        axes.plot([difference.low, difference.high], [at, at], color=colors[label], solid_capstyle="round", linewidth=2)
        axes.plot([difference.mean], [at], "o", color=colors[label], markersize=5.5)
    axes.set_yticks(range(len(scores)), [in_lines(label, _NAME) for label in scores])
    axes.set_ylim(len(scores) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("percentage points")


def preservation(measured: Mapping[str, Sequence[Preservation]], styles: Styles) -> Plate:
    """Plot correlation, KL and top-1 agreement by position in the answer and by token class.

    Args:
        measured: method's label -> results of each of its runs.
    """
    by_position = {label: [p.by_position for p in of] for label, of in measured.items()}
    by_class = {label: [p.by_class for p in of] for label, of in measured.items()}
    panels = [
        Panel(f"preservation_{kind}_{measure}", f"{title}, by {said}", partial(draw, groups, names, styles, measure), h)
        for kind, said, groups, names, draw, h in (
            ("position", "position", by_position, POSITIONS, _draw_by_position, 2.5),
            (
                "class",
                "token class",
                by_class,
                CLASSES,
                _draw_by_class,
                0.9 + 0.13 * len(CLASSES) * (len(measured) + 1),
            ),
        )
        for measure, title in MEASURE_NAMES.items()
    ]
    return Plate(
        panels,
        {label: styles[label] for label in measured},
        "Means over tokens; bands and bars are standard errors over rows (over seeds where there are several). "
        "Positions count answer tokens from 0. Grey: the raw student, where training began.",
    )


Groups = Mapping[str, Sequence[Mapping[str, Group]]]


def mean_and_error(groups: Sequence[Mapping[str, Group]], name: str, measure: str) -> tuple[float, float]:
    """Return mean and standard error of one bin over a method's runs: over seeds or, for a single run, over rows.

    Missing values are NaN.
    """
    estimates = [group[name].measures[measure] for group in groups if name in group]
    found = [(e.mean, e.stderr) for e in estimates if e.mean is not None]
    means = [mean for mean, _ in found]
    if not means:
        return math.nan, math.nan
    if len(means) == 1:
        return means[0], found[0][1] or math.nan
    return float(np.mean(means)), float(np.std(means, ddof=1)) / math.sqrt(len(means))


def _draw_by_position(groups: Groups, names: Sequence[str], styles: Styles, measure: str, axes: Axes) -> None:
    shown = [name for name in names if any(name in run for runs in groups.values() for run in runs)]
    at = np.arange(len(shown))
    if measure == "kl_teacher":
        raw = [mean_and_error(next(iter(groups.values())), name, "kl_raw")[0] for name in shown]
        axes.plot(at, raw, color=AXIS, linestyle=(0, (4, 2)), linewidth=1.2, label="raw student")
    for label, runs in groups.items():
        style = styles[label]
        values = np.array([mean_and_error(runs, name, measure) for name in shown])
        means, errors = values[:, 0], np.nan_to_num(values[:, 1])
        axes.fill_between(at, means - errors, means + errors, color=style.color, alpha=0.15, linewidth=0)
        axes.plot(at, means, color=style.color, linestyle=style.dash, marker="o", markersize=3.2, label=label)
    axes.set_xticks(at, [name.replace("-", "–") for name in shown])
    axes.set_xlabel("position in the answer")


def _draw_by_class(groups: Groups, names: Sequence[str], styles: Styles, measure: str, axes: Axes) -> None:
    shown = [name for name in names if any(name in run for runs in groups.values() for run in runs)]
    offsets = np.linspace(-0.3, 0.3, len(groups)) if len(groups) > 1 else np.zeros(1)
    for offset, (label, runs) in zip(offsets, groups.items(), strict=True):
        values = np.array([mean_and_error(runs, name, measure) for name in shown])
        axes.errorbar(
            values[:, 0],
            np.arange(len(shown)) + offset,
            xerr=np.nan_to_num(values[:, 1]),
            fmt="o",
            color=styles[label].color,
            markersize=4.2,
            linewidth=1.2,
            label=label,
        )
    if measure == "kl_teacher":
        raw = [mean_and_error(next(iter(groups.values())), name, "kl_raw")[0] for name in shown]
        axes.plot(raw, range(len(shown)), "|", color=AXIS, markersize=11, label="raw student")
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
