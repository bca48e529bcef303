"""Tables that are made from the YAMLs of conf/ and the docstrings of deltakd/."""

from __future__ import annotations

import ast
import re
from pathlib import Path

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_READS = re.compile(r"\s*Reads:? (?P<roles>.*?)\.(?=\s|$)")


def loss_table(root: Path) -> str:
    """One row per file of conf/loss/."""
    return _table("`loss=`", root / "conf" / "loss")


def target_table(root: Path) -> str:
    """One row per file of conf/loss/target/."""
    return _table("`loss/target=`", root / "conf" / "loss" / "target")


def divergence_table(root: Path) -> str:
    """One row per file of conf/loss/divergence/."""
    return _table("`loss/divergence=`", root / "conf" / "loss" / "divergence", reads=False)


def matching_table(root: Path) -> str:
    """One row per file of conf/loss/matching/."""
    return _table("`loss/matching=`", root / "conf" / "loss" / "matching")


def _table(override: str, directory: Path, reads: bool = True) -> str:
    lines = ['<div class="files" markdown>', "", f"| {override} | what it is |", "| --- | --- |"]
    for path in sorted(directory.glob("*.yaml")):
        about, roles = described(path)
        text = f"{about}<br>Reads {roles}." if reads and roles != "–" else about
        lines.append(f"| `{path.stem}` | {text.replace('|', '&#124;')} |")
    return "\n".join([*lines, "", "</div>"])


def described(path: Path) -> tuple[str, str]:
    """Return the opening comment of a YAML, with links to arXiv, and the references that it says it reads.

    Raises:
        ValueError: the file opens with no comment, or the comment does not say what is read.
    """
    comment = opening_comment(path)
    found = _READS.search(comment)
    if found is None:
        raise ValueError(f"{path}: the opening comment must say what the loss reads: 'Reads: teacher.'")
    about = (comment[: found.start()] + comment[found.end() :]).strip()
    roles = re.sub(r"\b(teacher_raw_2|teacher_raw|teacher_2|student_raw|teacher)\b", r"`\1`", found["roles"])
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", about), roles.removeprefix("no references") or "–"


def opening_comment(path: Path) -> str:
    """Return the comment that a YAML opens with, as one line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def tree(root: Path) -> str:
    """The files of the package, each with the first sentence of its docstring."""
    package = root / "deltakd"
    sections = [_folder(package, "## The commands, and what all parts share")]
    for folder in sorted(path.parent for path in package.rglob("__init__.py") if path.parent != package):
        about = _first_sentence(folder / "__init__.py")
        sections.append(_folder(folder, f"## `{folder.relative_to(root).as_posix()}/`\n\n{about}"))
    return "\n\n".join(sections)


def example(name: str, root: Path) -> str:
    """A file of docs/examples/ as a block of code."""
    return f"```python\n{(root / 'docs' / 'examples' / name).read_text(encoding='utf-8').strip()}\n```"


def _folder(folder: Path, title: str) -> str:
    files = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("__")]
    rows = [f"| `{path.name}` | {_first_sentence(path).replace('|', '&#124;')} |" for path in files]
    table = ['<div class="files" markdown>', "", "| file | what it holds |", "| --- | --- |", *rows, "", "</div>"]
    return "\n".join([title, "", *(table if rows else [])])


def _first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(docstring.split("\n\n", 1)[0].split()))
