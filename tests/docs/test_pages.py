"""What the documentation says is true of the code: keys, commands, links, citations."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltakd.cli import COMMANDS
from deltakd.config.compose import CONF_DIR, check_overrides
from deltakd.init import write_experiment
from tests.docs.blocks import PAGES, ROOT, Block, bash_blocks, without_blocks, write_shown_files

sys.path.insert(0, str(ROOT / "docs" / "build"))
from tables import described, tree

#: Commands whose arguments are overrides of conf/train.yaml.
OVERRIDES = ("train", "cache", "generate", "evaluate", "plan")
#: Words of these commands that look like overrides and are none.
OWN_WORDS = ("run=", "model=", "output=", "push_to_hub=")
LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)")
#: Of conf/loss/treatment, which targets and matchings have as a part.
TREATMENT = ("centre", "clip", "mask", "mask_by")
CITATION = re.compile(r"docs/(\w+)\.md#([\w-]+)")
KEY = re.compile(r"`'?\+?((?:[a-z_0-9]+[./])*[a-z_0-9]+)(?:=[^`]*)?`")


def flat_keys(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            yield name
            yield from flat_keys(part, name)


def config_keys() -> set[str]:
    """Every dotted key that some file of conf/ has, and the choice of each group."""
    keys = set(flat_keys(yaml.safe_load((CONF_DIR / "train.yaml").read_text()), ""))
    for path in CONF_DIR.glob("*/**/*.yaml"):
        group = path.parent.relative_to(CONF_DIR)
        text = path.read_text(encoding="utf-8")
        prefix = "" if "# @package _global_" in text else ".".join(group.parts)
        content = yaml.safe_load(text) or {}
        keys |= {*flat_keys(content, prefix), group.as_posix(), ".".join(group.parts)}
        for entry in content.get("defaults", []):
            if entry == {"/loss/treatment@treatment": "none"}:
                keys |= {f"{prefix}.treatment", *(f"{prefix}.treatment.{name}" for name in TREATMENT)}
    return keys


def test_every_config_key_that_a_page_names_exists() -> None:
    known = config_keys()
    groups = {key.split(".")[0].split("/")[0] for key in known} - {"hydra"}
    unknown = []
    for page in PAGES:
        for name in KEY.findall(without_blocks(page)):
            dotted = name.replace("/", ".")
            first = CONF_DIR / dotted.split(".")[0]
            # `loss/target` is a group in a group; `rollout/entropy`, of a group without any, is a metric.
            is_metric = "/" in name and first.is_dir() and not any(path.is_dir() for path in first.iterdir())
            is_key = "." in dotted and first.name in groups and not is_metric
            if is_key and name not in known and dotted not in known:
                unknown.append(f"{page.name}: {name}")
    assert unknown == []


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of a reader who has written what the pages show."""
    home = tmp_path_factory.mktemp("reader")
    write_shown_files(home)
    write_experiment("my_run", [], home / "conf")
    with contextlib.chdir(home):
        yield home


@pytest.mark.parametrize("block", bash_blocks(), ids=lambda block: block.where)
def test_every_command_in_a_page_exists_with_its_keys(block: Block, reader: Path) -> None:
    for command, *words in block.commands():
        if command.startswith("-"):
            continue
        assert command in COMMANDS
        if command in OVERRIDES:
            check_overrides("train", [word for word in words if is_override(word)])


def is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-") and not word.startswith(OWN_WORDS)


def test_a_block_is_run_or_says_what_it_needs() -> None:
    titles = {block.title for block in bash_blocks()}
    assert {title for title in titles if not title.startswith(("needs ", "takes "))} <= {""}
    assert sum(block.runs for block in bash_blocks()) > 25


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").split()) <= 600
    for page in (readme, ROOT / "CONTRIBUTING.md"):
        links = LINK.findall(page.read_text(encoding="utf-8"))
        assert [link for link in links if not (ROOT / link).exists()] == []


def test_links_of_the_experiments_lead_to_pages_of_the_site() -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    from result_pages import relinked

    pages = {path: relinked(path) for path in sorted((ROOT / "experiments").glob("*/*.md"))}
    plane = pages[ROOT / "experiments" / "plane_cpu" / "README.md"]
    assert "](../design.md#plane)" in plane


def test_citations_of_the_documentation_in_the_code_lead_to_a_section() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cited = set()
    for name in listed.split():
        if (ROOT / name).is_file():
            cited |= set(CITATION.findall((ROOT / name).read_text(encoding="utf-8")))
    assert len(cited) >= 6
    for page, anchor in cited:
        assert f"{{ #{anchor} }}" in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), anchor


def test_every_command_is_in_the_readme_with_a_line() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"| `{name}` | " not in readme] == []


def test_every_loss_and_target_says_what_it_reads() -> None:
    for path in sorted((CONF_DIR / "loss").glob("**/*.yaml")):
        about, roles = described(path)
        assert about
        assert roles


def test_every_file_of_the_package_is_in_the_tree_with_a_sentence() -> None:
    rows = [line for line in tree(ROOT).splitlines() if line.startswith("| `")]
    files = [path for path in (ROOT / "deltakd").rglob("*.py") if not path.name.startswith("__")]
    assert len(rows) == len(files)
    assert [row for row in rows if row.endswith("|  |")] == []
