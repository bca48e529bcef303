"""The fenced blocks of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r'^```(?P<language>\w+)?(?: title="(?P<title>[^"]*)")?\n(?P<text>.*?)^```$', re.M | re.S)
#: What a block's title says if it is not run.
_NEEDS = re.compile(r"(needs|takes) ")
_SEPARATORS = re.compile(r"\n|&&|;(?= )")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        """False if its title says what it needs."""
        return not _NEEDS.match(self.title)

    def commands(self) -> Iterator[list[str]]:
        """The words of each command of ours in it: ["train", "loss=kd", ...]."""
        joined = self.text.replace("\\\n", " ")
        for line in _SEPARATORS.split(joined):
            words = shlex.split(line, comments=True)
            for number, word in enumerate(words):
                if word == "deltakd" and number == 0:
                    yield words[1:]
                elif word.startswith("deltakd.") and words[number - 1] == "-m":
                    yield [word.removeprefix("deltakd."), *words[number + 1 :]]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page, text.count("\n", 0, found.start()) + 1, found["language"] or "", found["title"] or "", found["text"]
        )
        for found in _FENCE.finditer(text)
    ]


def write_shown_files(folder: Path) -> None:
    """Write the code and configs that the pages show, where their titles say."""
    for page in PAGES:
        for block in blocks(page):
            if block.title.endswith((".py", ".yaml")):
                file = folder / block.title
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text, encoding="utf-8")


def bash_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == "bash"]


def without_blocks(page: Path) -> str:
    """The text of a page outside its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
