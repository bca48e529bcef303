"""The plane figure: two settings against a score, a heat map for each combination of all other settings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from deltakd.config.loss_names import flat
from deltakd.results.beyond import mean_and_stderr
from deltakd.results.drawing import AXIS, INK, SERIES, Panel, PanelTable, Plate
from deltakd.results.methods import Method, method_settings, stage_of

#: Settings drawn against each other unless the user names others: the plane of raw references (docs/design.md#plane).
KNOBS = ("delta_weight", "loss.target.v")
#: Held-out measure drawn beside the scores of answers.
_HELD_OUT = "val/kl_teacher"
#: Measures of which less is better; of all others, more.
_LESS = re.compile(r"(perplexity|ece|ce|loss|kl_\w+|repetition_\d)$")
#: Opacity of the worst and the best cell; text stays legible on both, on light and on dark ground.
_FAINT, _FULL = 0.06, 0.5
_NO_RUN = "not run"
#: Characters of a score and a plane's name in the name of a file.
_LONGEST_NAME = 100
#: Said where the user asked for a plane and there is none.
NO_PLANE = (
    "no finished methods have two values of each of these config keys, a score of this name, and nothing else that "
    "differs; keys are named as in config.yaml, scores as in summary.json"
)


@dataclass(frozen=True)
class PlaneRequest:
    """What to draw.

    Args:
        x, y: dotted config keys.
        scores: keys of ``summary.json``; empty: the main score of every set, and KL to the teacher on held-out rows.
    """

    x: str = KNOBS[0]
    y: str = KNOBS[1]
    scores: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One point.

    Args:
        mean: over training seeds.
        stderr: its standard error; None for one seed.
        seeds: number of finished runs.
    """

    mean: float
    stderr: float | None
    seeds: int


@dataclass(frozen=True)
class Plane:
    """Methods that differ only in two settings.

    Args:
        name: what they have in common and others have not.
        score: the score in the cells.
        x, y: the keys of the settings.
        columns, rows: their values, ascending; the union over all planes of a figure, so that these compare.
        cells: (x, y) -> point; absent where nothing was run.
    """

    name: str
    score: str
    x: str
    y: str
    columns: list[Any]
    rows: list[Any]
    cells: Mapping[tuple[Any, Any], Cell]

    @property
    def best(self) -> tuple[Any, Any] | None:
        """The best point; None if all are alike."""
        sign = 1 if less_is_better(self.score) else -1
        alike = len({cell.mean for cell in self.cells.values()}) < 2
        return None if alike else min(self.cells, key=lambda at: sign * self.cells[at].mean)

    @property
    def table(self) -> PanelTable:
        """The figure as text: a line for each value of y."""
        lines = [[_text(y), *(_shown(self.cells.get((x, y))) for x in self.columns)] for y in self.rows]
        return PanelTable([f"{self.y} \\ {self.x}", *map(_text, self.columns)], lines)


def less_is_better(score: str) -> bool:
    """Return True for perplexity, divergences, losses and calibration errors."""
    return _LESS.search(score.rpartition("/")[2]) is not None


def find_planes(methods: Sequence[Method], request: PlaneRequest) -> list[Plane]:
    """Return a plane for each score and each combination of the other settings with at least two values of both keys.

    Seeds are averaged; runs that are not finished count as not run.
    """
    placed = [(method, at) for method in methods if (at := _place(method, request)) is not None and method.finished]
    if len({x for _, (x, _) in placed}) < 2 or len({y for _, (_, y) in placed}) < 2:
        return []
    groups = _groups(placed, request)
    kept = [of for of in groups if len({x for _, (x, _) in of}) > 1 and len({y for _, (_, y) in of}) > 1]
    names = _names([[method for method, _ in of] for of in kept], request)
    points = [at for of in kept for _, at in of]
    columns, rows = _ordered([x for x, _ in points]), _ordered([y for _, y in points])
    scores = request.scores or _default_scores([method for of in kept for method, _ in of])
    found = []
    for score in scores:
        for name, of in zip(names, kept, strict=True):
            cells = {at: cell for method, at in of if (cell := _cell(method, score)) is not None}
            if cells:
                found.append(Plane(name, score, request.x, request.y, columns, rows, cells))
    return found


def plane_plate(methods: Sequence[Method], request: PlaneRequest) -> Plate:
    """Return a heat map for each plane, the scale shared by all planes of a score."""
    planes = find_planes(methods, request)
    panels = []
    for number, plane in enumerate(planes, 1):
        means = [cell.mean for other in planes if other.score == plane.score for cell in other.cells.values()]
        panels.append(
            Panel(
                _file_name(plane, number),
                f"{plane.score}: {plane.name}" if plane.name else plane.score,
                partial(_draw, plane, (min(means), max(means))),
                0.75 + 0.46 * len(plane.rows),
                plane.table,
            )
        )
    return Plate(
        panels,
        {},
        "Each cell is the mean over the training seeds of one setting, ± its standard error; where it has fewer seeds "
        f"than others it says so; {_NO_RUN}: no finished run. Fuller colour is better, on one scale for all maps of a "
        "score. The best cell of a map has a frame; it was picked by looking at all of them, so its lead is flattered.",
    )


def _file_name(plane: Plane, number: int) -> str:
    """Return ``plane_<number>_<score>_<name>`` in letters that any file system takes."""
    words = re.sub(r"[^A-Za-z0-9]+", "_", f"{plane.score} {plane.name}")[:_LONGEST_NAME]
    return f"plane_{number}_{words.strip('_')}"


def _place(method: Method, request: PlaneRequest) -> tuple[Any, Any] | None:
    """Return the method's values of both settings; None if it has not both, or does not use its delta weight."""
    config = flat(method.runs[0].config)
    if method.role or any(config.get(key) is None for key in (request.x, request.y)):
        return None
    if "delta_weight" in (request.x, request.y) and method.delta_weight is None:
        return None
    x, y = config[request.x], config[request.y]
    return (x, y) if isinstance(x, int | float | str) and isinstance(y, int | float | str) else None


Placed = tuple[Method, tuple[Any, Any]]


def _groups(placed: Sequence[Placed], request: PlaneRequest) -> list[list[Placed]]:
    """Return the methods grouped by all settings but the two, and but those that copy one of the two."""
    settings = [method_settings(method.runs[0]) for method, _ in placed]
    varying = {
        key
        for key in {key for one in settings for key in one}
        for axis, name in enumerate((request.x, request.y))
        if key == name or all(one[key] == at[axis] for one, (_, at) in zip(settings, placed, strict=True) if key in one)
    }
    groups: dict[str, list[Placed]] = {}
    for one, entry in zip(settings, placed, strict=True):
        key = repr(sorted((name, repr(value)) for name, value in one.items() if name not in varying))
        groups.setdefault(key, []).append(entry)
    return list(groups.values())


def _names(groups: Sequence[Sequence[Method]], request: PlaneRequest) -> list[str]:
    """Return what distinguishes each group: its stage of a study, or the settings in which the groups differ."""
    stages = [{stage_of(run) for method in of for run in method.runs} for of in groups]
    first = [next(iter(of)) for of in stages]
    if all(len(of) == 1 for of in stages) and None not in first and len(set(first)) == len(groups):
        return [str(name) for name in first]
    settings = [method_settings(of[0].runs[0]) | {"loss": of[0].loss} for of in groups]
    keys = sorted({key for one in settings for key in one if not key.endswith("_target_")})
    differing = [key for key in keys if len({repr(one.get(key)) for one in settings}) > 1]
    shown = [key for key in differing if key not in (request.x, request.y)]
    return [", ".join(f"{key.removeprefix('loss.')}={one.get(key)}" for key in shown) for one in settings]


def _ordered(values: Sequence[Any]) -> list[Any]:
    unique = list(dict.fromkeys(values))
    numbers = all(isinstance(value, int | float) for value in unique)
    return sorted(unique) if numbers else unique


def _default_scores(methods: Sequence[Method]) -> list[str]:
    """Return the first metric of the answers to each set, and KL to the teacher on held-out rows."""
    from deltakd.evaluation import MAIN_METRICS

    keys = dict.fromkeys(key for method in methods for run in method.finished for key in run.summary or {})
    sets = dict.fromkeys(name for method in methods for run in method.finished for name in run.answers)
    main = [next((f"{name}/{m}" for m in MAIN_METRICS if f"{name}/{m}" in keys), None) for name in sets]
    return [score for score in [*main, _HELD_OUT] if score in keys and score is not None]


def _cell(method: Method, score: str) -> Cell | None:
    given = [(run.summary or {}).get(score) for run in method.finished]
    values = [float(value) for value in given if isinstance(value, int | float) and math.isfinite(value)]
    return Cell(*mean_and_stderr(values), len(values)) if values else None


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}".replace("-", "−")


def _shown(cell: Cell | None, among: int | None = None) -> str:
    if cell is None:
        return _NO_RUN
    error = "" if cell.stderr is None else f" ± {_number(cell.stderr)}"
    seeds = f" ({cell.seeds} seed{'' if cell.seeds == 1 else 's'})" if among is None or cell.seeds < among else ""
    return _number(cell.mean) + error + seeds


def _draw(plane: Plane, scale: tuple[float, float], axes: Axes) -> None:
    low, high = scale
    most = max(cell.seeds for cell in plane.cells.values())
    for i, x in enumerate(plane.columns):
        for j, y in enumerate(plane.rows):
            cell = plane.cells.get((x, y))
            if cell is None:
                axes.add_patch(Rectangle((i - 0.48, j - 0.46), 0.96, 0.92, fill=False, edgecolor=AXIS, linestyle=":"))
                axes.text(i, j, _NO_RUN, ha="center", va="center", fontsize=7, color=INK)
                continue
            share = (cell.mean - low) / (high - low) if high > low else 0.5
            share = 1 - share if less_is_better(plane.score) else share
            shade = _FAINT + (_FULL - _FAINT) * share
            axes.add_patch(Rectangle((i - 0.5, j - 0.5), 1, 1, facecolor=SERIES[0][0], alpha=shade, linewidth=0))
            below = _shown(cell, most).removeprefix(_number(cell.mean)).strip()
            axes.text(i, j - 0.08, _number(cell.mean), ha="center", va="center", fontsize=9, color=INK)
            axes.text(i, j + 0.27, below, ha="center", va="center", fontsize=6.5, color=INK)
    if plane.best is not None:
        i, j = plane.columns.index(plane.best[0]), plane.rows.index(plane.best[1])
        axes.add_patch(Rectangle((i - 0.48, j - 0.48), 0.96, 0.96, fill=False, edgecolor=INK, linewidth=1.6))
    axes.set_xlim(-0.5, len(plane.columns) - 0.5)
    axes.set_ylim(-0.5, len(plane.rows) - 0.5)
    axes.invert_yaxis()
    axes.set_xticks(range(len(plane.columns)), [_text(value) for value in plane.columns])
    axes.set_yticks(range(len(plane.rows)), [_text(value) for value in plane.rows])
    axes.set_xlabel(plane.x)
    axes.set_ylabel(plane.y)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
