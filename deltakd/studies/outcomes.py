"""What the runs of a search or a multirun came to: the best of them, a table, a plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltakd.io.files import replacing

FINISHED, ENDED_EARLY, FAILED, UNFINISHED = "finished", "ended early", "failed", "unfinished"

#: Keys whose values are repetitions of one setting.
_REPETITION = "seed"
#: Panels of the plot in a row.
_COLUMNS = 3
_BEST, _OTHER, _POOR = "#d55e00", "#0072b2", "#999999"


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Args:
        number: of the trial or job.
        settings: key -> value of the overrides that differ among the runs.
        state: finished, ended early, failed or unfinished.
        objective: name of the metric.
        value: of the objective; None where there is none.
        seconds: how long it took, of an interrupted run since its last start; None where that is unknown.
        directory: the run directory.
    """

    number: int
    settings: dict[str, str]
    state: str
    objective: str
    value: float | None
    seconds: float | None
    directory: Path


@dataclass(frozen=True)
class Best:
    """The best setting.

    Args:
        settings: key -> value; without the seed where a setting was run under several.
        value: of the objective, the mean over seeds.
        stderr: standard error over seeds; None with one.
        seeds: how many runs are behind it.
        directory: of the run, or of the best one of its seeds.
    """

    settings: dict[str, str]
    value: float
    stderr: float | None
    seeds: int
    directory: Path

    def __str__(self) -> str:
        spread = "" if self.stderr is None else f" ± {self.stderr:.2g} (standard error over {self.seeds} seeds)"
        return f"{self.value:.6g}{spread}"

    @property
    def overrides(self) -> list[str]:
        """The settings as Hydra overrides."""
        return [f"{key}={value}" for key, value in self.settings.items()]


def in_short(settings: dict[str, str]) -> str:
    """Settings in a line to read: long numbers are cut to 4 digits."""
    return " ".join(f"{key}={_short(value)}" for key, value in settings.items())


def _short(text: str) -> str:
    number = _number(text)
    return text if number is None or len(text) <= 6 else f"{number:.4g}"


def find_best(outcomes: Sequence[Outcome], maximize: bool) -> Best | None:
    """The best finished setting; runs that differ in their seed alone are one setting, and their mean counts.

    Settings are compared only where their runs are as many as those of the most repeated one: else one lucky seed
    would win against a mean.
    """
    groups: dict[tuple[tuple[str, str], ...], list[tuple[float, Outcome]]] = {}
    for outcome in outcomes:
        if outcome.state == FINISHED and outcome.value is not None and math.isfinite(outcome.value):
            setting = tuple((key, value) for key, value in outcome.settings.items() if key != _REPETITION)
            groups.setdefault(setting, []).append((outcome.value, outcome))
    if not groups:
        return None
    most = max(map(len, groups.values()))
    sign = 1 if maximize else -1
    runs = max((g for g in groups.values() if len(g) == most), key=lambda g: sign * mean(value for value, _ in g))
    values = [value for value, _ in runs]
    _, best_run = max(runs, key=lambda run: sign * run[0])
    settings = {key: value for key, value in best_run.settings.items() if most == 1 or key != _REPETITION}
    stderr = stdev(values) / math.sqrt(most) if most > 1 else None
    return Best(settings, mean(values), stderr, most, best_run.directory)


def write_table(outcomes: Sequence[Outcome], path: Path) -> None:
    """One row a run: number, state, settings, objective, value, seconds, directory."""
    keys = _keys(outcomes)
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "state", *keys, "objective", "value", "seconds", "directory"])
        for o in outcomes:
            settings = [o.settings.get(key, "") for key in keys]
            value = "" if o.value is None else repr(o.value)
            seconds = "" if o.seconds is None else f"{o.seconds:.1f}"
            writer.writerow([o.number, o.state, *settings, o.objective, value, seconds, o.directory])


def write_plot(outcomes: Sequence[Outcome], maximize: bool, title: str, path: Path) -> bool:
    """The objective against each setting, one panel each; finished runs filled, those ended early hollow.

    Returns:
        Whether there was anything to plot.
    """
    shown = [o for o in outcomes if o.value is not None and math.isfinite(o.value)]
    keys = _keys(shown)
    if not shown or not keys:
        return False
    columns = min(len(keys), _COLUMNS)
    rows = math.ceil(len(keys) / columns)
    # Long names of choices stand upright, and need room.
    height = 3.2 + 0.06 * max((len(v) for o in shown for v in o.settings.values() if _number(v) is None), default=0)
    figure = Figure(figsize=(max(4.5, 3.8 * columns), height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    finished = [o for o in shown if o.state == FINISHED]
    best = max(finished, key=lambda o: (o.value or 0.0) if maximize else -(o.value or 0.0)) if finished else None
    for axis, key in zip(axes, keys, strict=False):
        _draw(axis, key, [o for o in shown if key in o.settings], best)
    for axis in list(axes)[len(keys) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.supylabel(shown[0].objective, fontsize=10)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return True


def _draw(axis: Axes, key: str, outcomes: Sequence[Outcome], best: Outcome | None) -> None:
    values = [o.settings[key] for o in outcomes]
    numbers = [_number(value) for value in values]
    if all(number is not None for number in numbers):
        places = [float(number or 0.0) for number in numbers]
        if min(places) > 0 and max(places) / min(places) > 30:
            axis.set_xscale("log")
    else:
        names = list(dict.fromkeys(values))
        places = [float(names.index(value)) for value in values]
        long = max(map(len, names)) > 8 or len(names) > 6
        axis.set_xticks(range(len(names)), names, rotation=90 if long else 0)
        axis.margins(x=0.15)
    for place, outcome in zip(places, outcomes, strict=True):
        colour = _BEST if outcome is best else _OTHER if outcome.state == FINISHED else _POOR
        face = colour if outcome.state == FINISHED else "none"
        axis.scatter([place], [outcome.value or 0.0], s=36, facecolors=face, edgecolors=colour, zorder=3)
    axis.set_xlabel(key, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _keys(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(key for o in outcomes for key in o.settings))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def incomparable(objective: str, keys: Sequence[str]) -> str | None:
    """Why values of the objective can't be compared, where that is so: each loss has a ``val/loss`` of its own.

    Args:
        objective: name of the metric.
        keys: of the overrides that differ among the runs.
    """
    guilty = [key for key in keys if key in ("loss", "delta_weight") or key.startswith("loss.")]
    if objective not in ("val/loss", "train/loss") or not guilty:
        return None
    return (
        f"{objective} is another quantity under each {', '.join(guilty)}, so the runs can't be compared by it; "
        "give objective=val/ce, or a score of answers such as val/rougeL"
    )
