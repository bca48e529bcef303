"""Format scores as text: in cells, and as tables in Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from deltakd.results.beyond import NOTES, BeyondTable
from deltakd.results.drawing import Panel
from deltakd.results.methods import Method
from deltakd.results.run_costs import CostTable
from deltakd.results.statistics import Difference
from deltakd.results.tables import Comparison, Score, notes_once


def shown_score(score: Score | None) -> str:
    """Return, for example, ``61.44 ± 2.81``."""
    if score is None:
        return "–"
    error = "" if score.spread.stderr is None else f" ± {score.spread.stderr:.2f}"
    return f"{score.spread.mean:.2f}{error}"


def shown_difference(difference: Difference | None) -> str:
    """Return, for example, ``+0.52 [−1.20, +2.24], p = 0.55``, with Holm's p."""
    if difference is None:
        return ""
    return (
        f"{signed(difference.mean)} [{signed(difference.low)}, {signed(difference.high)}], {shown_p(difference.p_holm)}"
    )


def signed(value: float) -> str:
    """Return two decimals with a sign, using a true minus."""
    return f"{value:+.2f}".replace("-", "−")


def shown_p(p: float) -> str:
    """Return, for example, ``p = 0.55`` or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def shown_seeds(method: Method) -> str:
    """Return the number of training seeds."""
    return str(len(method.seeds))


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Return all tables as Markdown."""
    return "\n\n".join(_markdown(table, notes) for table, notes in notes_once(comparisons)) + "\n"


def _markdown(table: Comparison, notes: Sequence[str]) -> str:
    head = ["method", "parameters", "seeds", *table.sets]
    lines = [f"## {table.title}", "", _md_line(head), "| --- | ---: | ---: |" + " ---: |" * len(table.sets)]
    for row in table.rows:
        role = f" ({row.method.shown_role})" if row.method.shown_role else ""
        cells = [f"{_md_escape(row.label)}{role}", _parameters(row.method), shown_seeds(row.method)]
        for name in table.sets:
            score = row.scores.get(name)
            value = f"**{shown_score(score)}**" if score and score.best else shown_score(score)
            difference = shown_difference(score.difference if score else None)
            cells.append(f"{value}<br>{difference}" if difference else value)
        lines.append(_md_line(cells))
    return "\n".join([*lines, "", *(f"* {_md_escape(note)}" for note in notes)])


def beyond_markdown(tables: Sequence[BeyondTable]) -> str:
    """Return the measures beyond ROUGE as Markdown; empty if there are none."""
    if not tables:
        return ""
    lines = ["", "## Beyond ROUGE"]
    for table in tables:
        lines += ["", f"### {_md_escape(table.title)}", "", _md_line(["method", *table.columns, "seeds"])]
        lines.append("| --- |" + " ---: |" * (len(table.columns) + 1))
        for row in table.rows:
            cells = [value + (f" ± {error}" if error else "") for value, error in row.cells]
            lines.append(_md_line([_md_escape(row.label), *cells, shown_seeds(row.method)]))
        if table.note:
            lines += ["", f"* {_md_escape(table.note)}"]
    return "\n".join([*lines, "", *(f"* {note}" for note in NOTES)]) + "\n"


def panels_markdown(heading: str, panels: Sequence[Panel]) -> str:
    """Return the tables of panels that have one as Markdown; empty if none has."""
    lines = []
    for panel in panels:
        if panel.table is not None:
            lines += ["", f"### {_md_escape(panel.title)}", "", _md_line(list(map(_md_escape, panel.table.head)))]
            lines.append("| --- |" + " ---: |" * (len(panel.table.head) - 1))
            lines += [_md_line(list(map(_md_escape, line))) for line in panel.table.lines]
    return "\n".join(["", f"## {heading}", *lines]) + "\n" if lines else ""


def cost_markdown(table: CostTable) -> str:
    """Return the costs as Markdown; empty if nothing was trained."""
    if not table.rows:
        return ""
    lines = ["", "## Cost", "", _md_line(["method", "runs", *table.columns])]
    lines.append("| --- |" + " ---: |" * (len(table.columns) + 1))
    lines += [_md_line([_md_escape(row.label), str(row.runs), *row.cells]) for row in table.rows]
    return "\n".join([*lines, "", *(f"* {note}" for note in table.notes)]) + "\n"


def _md_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _md_escape(text: str) -> str:
    for character in "\\`*_|<>":
        text = text.replace(character, f"\\{character}")
    return text


def _parameters(method: Method) -> str:
    return "–" if method.parameters is None else f"{method.parameters:,}"


def latex(comparisons: Sequence[Comparison]) -> str:
    """Return all tables as LaTeX (packages ``booktabs`` and ``amsmath``)."""
    return "\n".join(_latex(table, notes) for table, notes in notes_once(comparisons))


def _latex(table: Comparison, notes: Sequence[str]) -> str:
    columns = "".join("rl" for _ in table.sets)
    head = "".join(rf" & \multicolumn{{2}}{{c}}{{{_tex(name)}}}" for name in table.sets)
    lines = [
        f"% {table.title}",
        *(f"% {note}" for note in notes),
        rf"\begin{{tabular}}{{lrr{columns}}}",
        r"\toprule",
        rf"method & parameters & seeds{head} \\",
        r"\midrule",
    ]
    for previous, row in zip([None, *table.rows], table.rows, strict=False):
        if previous is not None and previous.method.role and not row.method.role:
            lines.append(r"\midrule")
        cells = [_tex(row.label), _parameters(row.method), shown_seeds(row.method)]
        lines.append(" & ".join([*cells, *(_tex_score(row.scores.get(name)) for name in table.sets)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _tex_score(score: Score | None) -> str:
    if score is None:
        return "-- & "
    value = shown_score(score).replace(" ± ", r" \pm ")
    value = rf"$\boldsymbol{{{value}}}$" if score.best else f"${value}$"
    d = score.difference
    return f"{value} & " + ("" if d is None else rf"\small ${d.mean:+.2f}\ [{d.low:+.2f}, {d.high:+.2f}]$")


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
