"""What mkdocs.yml hooks into the build: pages, tables and formulas that are made from the repository itself."""

from __future__ import annotations

import html
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))

from result_pages import experiment_pages, page_names
from tables import divergence_table, example, loss_table, matching_table, target_table, tree

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[2]

#: What stands on a line of its own in a page, as <!-- name -->, and what takes its place.
GENERATED = {
    "losses": loss_table,
    "targets": target_table,
    "divergences": divergence_table,
    "matchings": matching_table,
    "tree": tree,
    **{path.stem: partial(example, path.name) for path in (ROOT / "docs" / "examples").glob("*.py")},
}

_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', flags=re.DOTALL)
#: Code, which stays as it is, or a symbol with an index: z_t0, π_θ.
_INDEXED = re.compile(
    r"(?P<code>^ *```.*?^ *```$|^    [^\n]*$|`[^`\n]*`|\$\$.*?\$\$)|\b(?P<symbol>[zpπwβ])_(?P<index>[a-zθ]\w*)",
    flags=re.DOTALL | re.MULTILINE,
)
_MARK = re.compile(r"^<!-- (\w+) -->$", flags=re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages of the experiments under Results."""
    (section,) = (entry["Results"] for entry in config.nav or [] if "Results" in entry)
    section.extend(page_names(ROOT / "experiments"))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README of every experiment as a page, with its figures."""
    for file in experiment_pages(ROOT / "experiments", config):
        files.append(file)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the generated tables in place of their marks, and indices below the line.

    Raises:
        KeyError: a mark names no table.
    """
    written = _MARK.sub(lambda mark: GENERATED[mark[1]](ROOT), markdown)
    return _INDEXED.sub(lambda found: found["code"] or f"{found['symbol']}<sub>{found['index']}</sub>", written)


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML, which browsers show without a script."""
    return _FORMULA.sub(_as_mathml, content)


def _as_mathml(found: re.Match[str]) -> str:
    latex = html.unescape(found["latex"]).strip()
    return convert(latex, display="inline" if found["tag"] == "span" else "block")
