"""The READMEs of experiments/ as pages of the site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

DOCS = Path(__file__).resolve().parents[1]

_FIGURES = (".png", ".svg")
_LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def experiment_pages(directory: Path, config: MkDocsConfig) -> Iterator[File]:
    """Make a page of every Markdown file in a folder of ``directory``, and carry over the figures."""
    for path in sorted(directory.glob("*/*.md")):
        yield File.generated(config, page_name(path), content=relinked(path))
    for path in sorted(path for path in directory.glob("*/figures/*") if path.suffix in _FIGURES):
        name = f"results/{path.parts[-3]}/{path.name}"
        yield File.generated(config, name, abs_src_path=str(path))


def page_names(directory: Path) -> list[str]:
    """Return the pages of the READMEs in the folders of ``directory``, and of the further files beside them."""
    return [page_name(path) for path in sorted(directory.glob("*/*.md"))]


def page_name(path: Path) -> str:
    """Return where the page of a file in experiments/ goes: results/quickstart.md, results/scale_paper_plan.md."""
    folder = path.parent.name
    return f"results/{folder}.md" if path.stem == "README" else f"results/{folder}_{path.stem}.md"


def relinked(path: Path) -> str:
    """Return the text of a file with its links to other files pointing at their pages.

    Raises:
        ValueError: a link leads to no file, or to one that is not on the site.
    """

    def link(found: re.Match[str]) -> str:
        target, _, anchor = found[1].partition("#")
        file = (path.parent / target).resolve()
        if not file.is_file():
            raise ValueError(f"{path}: there is no file that the link to {found[1]} leads to")
        if file.suffix == ".md" and file.parent.parent == path.parent.parent.resolve():
            name = page_name(file).removeprefix("results/")
        elif file.suffix == ".md" and file.parent == DOCS:
            name = f"../{file.name}"
        elif file.suffix in _FIGURES:
            name = f"{file.parts[-3]}/{file.name}"
        else:
            raise ValueError(f"{path}: the link to {found[1]} leads nowhere on the site")
        return f"]({name}{'#' + anchor if anchor else ''})"

    return _LINK.sub(link, path.read_text(encoding="utf-8"))
