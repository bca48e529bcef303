"""Panels, drawn as SVG for a page whose style sheet sets the colours, and as PDF for a paper."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deltakd.io.files import replacing, write_text

#: Colours of the methods, in order: (on light ground, on dark ground).
SERIES = (
    ("#1f6fb4", "#6db1f0"),
    ("#d1600a", "#ff9f52"),
    ("#2a8a4a", "#63c98a"),
    ("#8a4fbf", "#c39af0"),
    ("#c0325a", "#ff7f9f"),
    ("#8a7410", "#d4c25a"),
    ("#0f8a92", "#4fd0d8"),
    ("#6b6f76", "#a9adb5"),
)
INK, AXIS, GRID = "#3d4148", "#9aa0a8", "#e4e6ea"
#: Variables of the style sheet: (on light ground, on dark ground).
COLORS = {f"series-{i}": pair for i, pair in enumerate(SERIES, 1)} | {
    "figure-ink": (INK, "#c3c9d1"),
    "figure-axis": (AXIS, "#6d757f"),
    "figure-grid": (GRID, "#2a2f36"),
}
#: Colour of a drawing -> its variable in the style sheet.
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLORS.items()}
#: Inches that a letter and a line of a legend take.
_LETTER, _LINE = 0.085, 0.18
_DASHES = ("solid", (0, (4, 1.6)), (0, (1.2, 1.4)))

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "deltakd",
    "pdf.fonttype": 42,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": AXIS,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}


@dataclass(frozen=True)
class Style:
    """How a method is drawn in every figure.

    Args:
        number: number of its colour in the style sheet, from 1.
        color: its colour on light ground.
        dash: dash pattern of its lines; it distinguishes methods of one colour.
    """

    number: int
    color: str
    dash: str | tuple[int, tuple[float, ...]]

    @property
    def dashed(self) -> bool:
        """True if an earlier method has the same colour."""
        return self.dash != "solid"


def in_lines(label: str, width: int) -> str:
    """Return the name of a method with line breaks, so that it does not push the axes out of the figure."""
    return "\n".join(textwrap.wrap(label, width, break_on_hyphens=False))


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """Return a style for each label, by its position."""
    return {
        label: Style(i % len(SERIES) + 1, SERIES[i % len(SERIES)][0], _DASHES[min(i // len(SERIES), len(_DASHES) - 1)])
        for i, label in enumerate(labels)
    }


@dataclass(frozen=True)
class PanelTable:
    """A panel's figures as text, for readers who do not see it.

    Args:
        head: headings of the columns.
        lines: cells, line by line; the first is the line's heading.
    """

    head: list[str]
    lines: list[list[str]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        name: name of its file, and prefix of its ids in the page.
        title: its heading in the page.
        draw: draws into empty axes; lines are labelled by their method.
        height: inches, at a width of WIDTH.
        table: its figures as text, shown on demand; None if the page has them elsewhere.
    """

    name: str
    title: str
    draw: Callable[[Axes], None]
    height: float = 2.5
    table: PanelTable | None = None

    WIDTH = 4.4

    @cached_property
    def svg(self) -> str:
        """An ``<svg>`` element that scales with its container; colours are variables of the style sheet."""
        stream = io.StringIO()
        with mpl.rc_context(_RC):
            self._figure(legend=False).savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        return _embedded(stream.getvalue(), self.name, self.title)

    def write_pdf(self, folder: Path) -> Path:
        """Write ``<name>.pdf``, with a legend, and return its path."""
        path = folder / f"{self.name}.pdf"
        with mpl.rc_context(_RC), replacing(path) as partial:
            self._figure(legend=True).savefig(partial, format="pdf", metadata={"CreationDate": None})
        return path

    def write_svg(self, folder: Path) -> Path:
        """Write ``<name>.svg``, which follows the reader's light or dark theme, and return its path."""
        light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in COLORS.items()) for i in (0, 1))
        style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
        path = folder / f"{self.name}.svg"
        write_text(path, re.sub(r"(<svg[^>]*>)", lambda root: root[1] + style, self.svg, count=1) + "\n")
        return path

    def _figure(self, legend: bool) -> Figure:
        figure = Figure(figsize=(self.WIDTH, self.height), layout="constrained")
        axes = figure.add_subplot()
        self.draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if legend and handles:
            shown = dict(zip(labels, handles, strict=True))
            names = [in_lines(label, 45) for label in shown]
            longest = max(len(line) for name in names for line in name.splitlines())
            columns = max(1, min(4, len(shown), int(self.WIDTH / (0.5 + longest * _LETTER))))
            lines = math.ceil(sum(name.count("\n") + 1 for name in names) / columns)
            # However many methods there are, the axes keep their size.
            figure.set_figheight(self.height + _LINE * max(0, lines - 2))
            figure.legend(shown.values(), names, loc="outside upper center", ncols=columns)
        return figure


@dataclass(frozen=True)
class Plate:
    """Panels that share a legend and a caption.

    Args:
        panels: shown side by side if there is room.
        legend: label -> style.
        caption: explains how to read them.
    """

    panels: list[Panel]
    legend: Mapping[str, Style] = field(default_factory=dict)
    caption: str = ""


def _embedded(svg: str, name: str, title: str) -> str:
    """Return a stand-alone SVG made fit for a page: no prolog, no style sheet, ids unique among figures."""
    svg = svg[svg.index("<svg") :]
    # Its style sheet would apply to the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"\n\s*", "\n", svg)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
