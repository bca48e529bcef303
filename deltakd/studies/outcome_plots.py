"""The plot of a search or a multirun: the objective against each setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltakd.io.files import replacing
from deltakd.studies.outcomes import FINISHED, Outcome, as_number, keys_of

#: Panels in a row.
_COLUMNS = 3
_BEST, _OTHER, _POOR = "#d55e00", "#0072b2", "#999999"


def write_plot(outcomes: Sequence[Outcome], maximize: bool, title: str, path: Path) -> bool:
    """Plot the objective against each setting, one panel each; runs that ended early are hollow.

    Returns:
        True if there was anything to plot.
    """
    shown = [o for o in outcomes if o.value is not None and math.isfinite(o.value)]
    keys = keys_of(shown)
    if not shown or not keys:
        return False
    columns = min(len(keys), _COLUMNS)
    rows = math.ceil(len(keys) / columns)
    # Long choice names are drawn vertically, and need room.
    height = 3.2 + 0.06 * max((len(v) for o in shown for v in o.settings.values() if as_number(v) is None), default=0)
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
    numbers = [as_number(value) for value in values]
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
