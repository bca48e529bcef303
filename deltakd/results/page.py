"""Assemble the report, and write it as one self-contained page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from deltakd.evaluation.token_groups import Preservation
from deltakd.io.files import make_folder, write_text
from deltakd.results import figures, sections
from deltakd.results.beyond import NOTES, beyond_tables
from deltakd.results.delta_weights import delta_weights
from deltakd.results.drawing import COLORS, Plate, Style, styles
from deltakd.results.formats import (
    beyond_markdown,
    cost_markdown,
    latex,
    markdown,
    panels_markdown,
    shown_difference,
)
from deltakd.results.methods import Method
from deltakd.results.planes import PlaneRequest, plane_plate
from deltakd.results.run_costs import cost_table
from deltakd.results.tables import Comparison, notes_once
from deltakd.results.written import Responses, responses_of

_TEMPLATES = Path(__file__).parent / "templates"
#: Sections that hold only figures: id, heading, plate.
_FIGURE_SECTIONS = (
    ("weights", "Against the delta weight", "weights"),
    ("planes", "Two settings against a score", "planes"),
    ("curves", "Learning curves", "curves"),
    ("parts", "Parts of the loss", "parts"),
)


@dataclass(frozen=True)
class Page:
    """The contents of a report.

    Args:
        title: its heading.
        lead: the sentence under it.
        warnings: what is left out or unfinished, one sentence each.
        methods: references first.
        comparisons: the tables of scores.
        measured: method's label -> shift preservation of its runs, where it could be measured.
        missing: why shift preservation could not be measured, one sentence each.
        responses: what the students of on-policy runs wrote while they trained.
        command: the command that wrote the report.
        styles: method's label -> how it is drawn.
        plane: the settings and scores of the plane figure.
    """

    title: str
    lead: str
    warnings: list[str]
    methods: list[Method]
    comparisons: list[Comparison]
    measured: Mapping[str, Sequence[Preservation]]
    missing: list[str]
    responses: list[Responses]
    command: str
    styles: Mapping[str, Style]
    plane: PlaneRequest = field(default_factory=PlaneRequest)

    @cached_property
    def plates(self) -> dict[str, Plate]:
        students = [method for method in self.methods if not method.role] or self.methods
        trained = [method for method in students if any(run.curves for run in method.runs)]
        return {
            "differences": figures.differences(self.comparisons, self.styles),
            "weights": delta_weights(self.comparisons, self.methods, self.styles),
            "planes": plane_plate(self.methods, self.plane),
            "curves": figures.learning_curves(trained, self.styles),
            "parts": figures.loss_parts(trained, self.styles),
            "preservation": figures.preservation(self.measured, self.styles) if self.measured else Plate([]),
        }


def make_page(
    title: str,
    methods: Sequence[Method],
    comparisons: Sequence[Comparison],
    preservation: Mapping[str, Sequence[Preservation]],
    notes: Sequence[str],
    command: str,
    plane: PlaneRequest | None = None,
) -> Page:
    """Put a report together.

    Args:
        title: its heading.
        methods: references first.
        comparisons: see ``make_comparisons``.
        preservation: method's label -> shift preservation of each of its runs, or what it lacked.
        notes: what is left out, one sentence each.
        command: the command that writes the report.
        plane: the settings and scores of the plane figure; None: the plane of raw references.
    """
    runs = [run for method in methods for run in method.runs]
    unfinished = [
        f"{run.path}: {sections.state_of(run)}; its curves are shown so far." for run in runs if not run.finished
    ]
    measured = {label: [p for p in of if p.overall is not None] for label, of in preservation.items()}
    lacking = {label: dict.fromkeys(text for p in of for text in p.missing) for label, of in preservation.items()}
    students = [method for method in methods if not method.role]
    responses, unread = responses_of(students)
    finished = sum(run.finished for run in runs)
    return Page(
        title=title,
        lead=f"{_count(finished, 'finished run')} of {_count(len(students), 'method')}"
        + (
            f" and {_count(len(methods) - len(students), 'model')} that they learnt from"
            if len(methods) > len(students)
            else ""
        )
        + ".",
        warnings=[*notes, *unfinished, *unread],
        methods=list(methods),
        comparisons=list(comparisons),
        measured={label: of for label, of in measured.items() if of},
        missing=[f"{label}: {text}" for label, texts in lacking.items() for text in texts],
        responses=responses,
        command=command,
        # Only methods get colours; references are never drawn beside them.
        styles=styles([method.label for method in students or methods]),
        plane=plane or PlaneRequest(),
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def render(page: Page, tidy: Callable[[str], str] = str) -> str:
    """Return the page as HTML.

    All foreign text is escaped, especially model output; the page allows its one script by hash, so no other can run.

    Args:
        page: the contents.
        tidy: applied to paths, commands and messages, to remove private parts.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    environment.filters |= {"tidy": tidy, "trusted": Markup, "difference": shown_difference}
    script = (_TEMPLATES / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    plates = page.plates
    content = {
        "page": _View(page, plates),
        "styles": page.styles,
        "style": Markup(environment.get_template("style.css").render(colors=COLORS)),
        "script": Markup(script),
        "script_hash": digest,
    }
    return environment.get_template("report.html").render(content)


class _View:
    """A page as the template reads it."""

    def __init__(self, page: Page, plates: Mapping[str, Plate]) -> None:
        self._page = page
        self.plates = plates
        self.figure_sections = [entry for entry in _FIGURE_SECTIONS if plates[entry[2]].panels]
        self.settings = sections.settings_of(page.methods)
        self.tables = notes_once(page.comparisons)
        self.beyond = beyond_tables(page.methods)
        self.beyond_notes = NOTES
        self.preserved = sections.preserved_rows(page.measured)
        self.token_view = sections.token_view(page.measured)
        self.examples = sections.examples(page.methods)
        self.costs = cost_table(page.methods)
        self.runs = sections.run_rows(page.methods)
        self.study_commands = sections.study_commands(page.methods)
        self.run_commands = sections.run_commands(page.methods)
        self.versions = sections.versions(page.methods)
        self.written = f"{datetime.now():%Y-%m-%d %H:%M}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._page, name)

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Id and short heading of every section present."""
        shown = [
            ("results", "Results", True),
            ("beyond", "Beyond ROUGE", bool(self.beyond)),
            *((id_, heading, True) for id_, heading, _ in self.figure_sections),
            ("preservation", "Shift preservation", bool(self.preserved or self._page.missing)),
            ("tokens", "Token view", self.token_view is not None),
            ("answers", "Answers", bool(self.examples)),
            ("responses", "Responses", bool(self._page.responses)),
            ("cost", "Cost", True),
            ("runs", "Runs", True),
        ]
        return [(id_, heading) for id_, heading, there in shown if there]


def write_report(page: Page, folder: Path, tidy: Callable[[str], str] = str) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``table.tex``, ``figures/*.pdf``, and heat maps as ``figures/*.svg``, too.

    Args:
        page: the contents.
        folder: created if absent; files of an earlier report are replaced.
        tidy: see ``render``.

    Returns:
        The files written, the page first.
    """
    drawings = folder / "figures"
    make_folder(drawings, "the report")
    for old in [*drawings.glob("*.pdf"), *drawings.glob("*.svg")]:
        old.unlink()
    texts = {
        "report.html": render(page, tidy),
        "report.md": f"# {page.title}\n\n{markdown(page.comparisons)}"
        + beyond_markdown(beyond_tables(page.methods))
        + panels_markdown("Two settings against a score", page.plates["planes"].panels)
        + cost_markdown(cost_table(page.methods))
        + _settings(page)
        + _notes(page, tidy),
        "table.tex": latex(page.comparisons),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    panels = [panel for plate in page.plates.values() for panel in plate.panels]
    drawn = [panel.write_pdf(drawings) for panel in panels]
    # Heat maps have no legend: they are also made fit for a README.
    drawn += [panel.write_svg(drawings) for panel in page.plates["planes"].panels]
    return [folder / name for name in texts] + drawn


def _settings(page: Page) -> str:
    """Return the legend: in which settings methods of one loss differ."""
    lines = [f"* {label}: {', '.join(settings)}\n" for label, settings in sections.settings_of(page.methods)]
    return "".join(["\nSettings in which methods of one loss differ:\n\n", *lines]) if lines else ""


def _notes(page: Page, tidy: Callable[[str], str]) -> str:
    lines = [tidy(warning) for warning in page.warnings]
    return "\nLeft out or unfinished:\n\n" + "".join(f"* {line}\n" for line in lines) if lines else ""
