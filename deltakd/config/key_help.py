"""The text of ``deltakd train --help``: the groups with their choices, and every key with its comment in ``conf/``."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deltakd.config.folders import CONF_DIR, choice_files, choices, group_names

USAGE = """Train one model; with --multirun one for every combination of settings.

  python -m deltakd.train experiment=NAME [GROUP=CHOICE ...] [KEY=VALUE ...]
  python -m deltakd.train --multirun experiment=NAME loss=sft,kd,delta_kd seed=1,2,3

  --cfg job            print the composed config, train nothing
  --config-dir DIR     your own configs: DIR/experiment/NAME.yaml, DIR/loss/NAME.yaml (./conf is found without it)
  trainer.dry_run=true print the memory that the run needs
  --hydra-help         Hydra's own options

deltakd init NAME writes an experiment file for models and data of your own.
"""


def key_help(arguments: Sequence[str]) -> str:
    """Return the help of ``deltakd.train``.

    Args:
        arguments: of the command line; ``loss=kd_jsd`` among them shows that loss's keys.
    """
    chosen = dict(word.split("=", 1) for word in arguments if "=" in word)
    base = (CONF_DIR / "train.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(base)
    parts = [USAGE, "Groups (GROUP=CHOICE):\n", *_groups(), "\nKeys with their defaults (KEY=VALUE):\n"]
    # The command and the groups come before the first blank line, Hydra's part at the end.
    parts.append(base.partition("\n\n")[2].partition("\nhydra:")[0].strip("\n"))
    for group, choice in _defaults(content["defaults"]):
        given = chosen.get(group, choice)
        names = given.strip("[]").split(",") if isinstance(given, str) else given or []
        for name in names if isinstance(names, list) else [names]:
            parts += _section(group, str(name), group.replace("/", "."))
    return "\n".join(parts)


def _groups() -> Iterator[str]:
    width = max(len(name) for name in group_names())
    for name in group_names():
        if choices(name) and not name.startswith("hydra"):
            text = f"  {name:{width}}  {', '.join(choices(name))}"
            yield textwrap.fill(text, 118, subsequent_indent=" " * (width + 4), break_on_hyphens=False)


def _section(group: str, name: str, key: str) -> list[str]:
    """Return a file's keys below the key of their group, then the keys of its parts."""
    files = choice_files(group, name)
    if not files:
        return []
    text = files[0].read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    if not isinstance(content, Mapping):
        return []
    keys = [key for key in content if not str(key).startswith("_")]
    if "# @package _global_" in text or not keys:
        return []
    body = _body(text, ("defaults", "_target_", "_partial_"))
    found = [f"\n{key}:  # {_shown(files[0])}\n{textwrap.indent(body, '  ')}"]
    for part, choice in _defaults(content.get("defaults", [])):
        inner, _, place = part.partition("@")
        below = inner.lstrip("/") if inner.startswith("/") else f"{group}/{inner}"
        found += _section(below, str(choice), f"{key}.{place or inner}")
    return found


def _defaults(entries: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for entry in entries:
        if isinstance(entry, Mapping):
            for group, choice in entry.items():
                if choice is not None and not str(group).startswith("override"):
                    yield str(group), choice


def _body(text: str, without: Sequence[str]) -> str:
    """Return a YAML's lines without some top-level keys."""
    lines, skipping = [], False
    for line in text.splitlines():
        key = re.match(r"(\w+):", line)
        if key or line.startswith("#"):
            skipping = key is not None and key[1] in without
        if not skipping and not re.match(r"\s+_(target|partial)_:", line):
            lines.append(line)
    return "\n".join(lines).strip("\n")


def _shown(file: Path) -> str:
    return f"conf/{file.relative_to(CONF_DIR)}" if file.is_relative_to(CONF_DIR) else str(file)
