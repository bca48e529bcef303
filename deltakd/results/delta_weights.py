"""The delta weight figure: scores of answers, KL to the teacher and shift preservation against the weight."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes

from deltakd.results.beyond import MEASURES, mean_and_stderr, measured_values, set_title
from deltakd.results.drawing import Panel, Plate, Style
from deltakd.results.methods import Method
from deltakd.results.tables import Comparison

#: Measures on held-out rows to draw, besides the scores of answers.
_HELD_OUT = ("kl_teacher", "shift_correlation")


@dataclass(frozen=True)
class _Value:
    """A method in a panel; ``mark`` is its protocol's mark in a mixed table."""

    label: str
    method: Method
    mean: float
    stderr: float | None
    mark: int | None = None


@dataclass(frozen=True)
class _Line:
    """Methods that differ only in the delta weight, by ascending weight."""

    name: str
    style: Style
    points: list[tuple[float, _Value]]


def delta_weights(tables: Sequence[Comparison], methods: Sequence[Method], styles: Mapping[str, Style]) -> Plate:
    """Return a panel for each score and measure with a loss that was run at several weights.

    A line joins methods that differ only in the weight, regardless of their names; its point at 0 may be plain
    distillation with the same settings. Methods without a weight are horizontal lines.

    Args:
        tables: give the scores of answers.
        methods: give the measures on held-out rows.
        styles: method's label -> how it is drawn.
    """
    panels = []
    legend: dict[str, Style] = {}
    for name, title, values in _all_values(tables, methods):
        lines = _lines(values, styles)
        if lines:
            levels = [value for value in values if value.method.delta_weight is None]
            drawn = {level.label: styles[level.method.label] for level in levels}
            legend |= {line.name: line.style for line in lines} | drawn
            panels.append(Panel(f"delta_weight_{name}", title, partial(_draw, lines, levels, drawn)))
    return Plate(
        panels,
        legend,
        "Bars are standard errors. Dotted: methods that have no delta weight; where one of them is what a loss becomes "
        "at weight 0, it is that line's point there, too.",
    )


def _all_values(tables: Sequence[Comparison], methods: Sequence[Method]) -> list[tuple[str, str, list[_Value]]]:
    """Return name, title and values of each candidate panel, without references, which are larger models."""
    found = []
    for number, table in enumerate(tables, 1):
        for name in table.sets:
            values = [
                _Value(row.label, row.method, row.scores[name].spread.mean, row.scores[name].spread.stderr, row.mark)
                for row in table.rows
                if name in row.scores and not row.method.role
            ]
            file = f"{table.metric}_{re.sub(r'[^A-Za-z0-9]+', '_', name)}_{number}"
            found.append((file, f"{name}: {table.title}", values))
    for measure in _HELD_OUT:
        by_method = [(method, measured_values(method, "val", measure)) for method in methods if not method.role]
        values = [_Value(method.label, method, *mean_and_stderr(of)) for method, of in by_method if of]
        found.append((f"{measure}_val", f"{set_title('val')}: {MEASURES[measure][0]}", values))
    return found


def _lines(values: Sequence[_Value], styles: Mapping[str, Style]) -> list[_Line]:
    families: dict[tuple[str, int | None], list[_Value]] = {}
    for value in values:
        if value.method.delta_weight is not None:
            families.setdefault((value.method.family, value.mark), []).append(value)
    lines: list[_Line] = []
    for of in families.values():
        points = [(value.method.delta_weight or 0.0, value) for value in of]
        points += [(0.0, value) for value in values if _is_zero_of(value, of)]
        if len({weight for weight, _ in points}) > 1:
            name = _name(of, [line.name for line in lines])
            lines.append(_Line(name, styles[of[0].method.label], sorted(points, key=lambda point: point[0])))
    return lines


def _is_zero_of(value: _Value, family: Sequence[_Value]) -> bool:
    """Return True if a method equals the family at weight 0, and the family has no run there."""
    if value.method.delta_weight is not None or value.mark != family[0].mark:
        return False
    own = any(other.method.delta_weight == 0 for other in family)
    return value.method.at_zero is not None and value.method.at_zero == family[0].method.at_zero and not own


def _name(family: Sequence[_Value], taken: Sequence[str]) -> str:
    """Return the labels' common text without the weight; the loss if they differ otherwise, or name no weight."""
    without = [re.sub(r" ?delta_weight=\S+", "", value.label) for value in family]
    same = len(set(without)) == 1 and without[0] != family[0].label
    name = without[0] if same else family[0].method.loss
    count = sum(other == name or other.startswith(f"{name} (") for other in taken)
    return f"{name} ({count + 1})" if count else name


def _draw(lines: Sequence[_Line], levels: Sequence[_Value], drawn: Mapping[str, Style], axes: Axes) -> None:
    for line in lines:
        weights = [weight for weight, _ in line.points]
        means = [value.mean for _, value in line.points]
        errors = [value.stderr or 0.0 for _, value in line.points]
        color = line.style.color
        axes.errorbar(weights, means, errors, color=color, marker="o", markersize=4, linestyle="-", label=line.name)
    for level in levels:
        color = drawn[level.label].color
        axes.axhline(level.mean, color=color, linestyle=(0, (1, 1.5)), linewidth=1.2, label=level.label)
    axes.set_xlabel("delta_weight")
