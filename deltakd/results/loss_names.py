"""What a resolved loss config is called: the name of the YAML in ``conf/loss`` that it was composed from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

#: Loss name -> its settings, flat.
KnownLosses = Mapping[str, Mapping[str, Any]]


def read_losses(folder: Path) -> dict[str, dict[str, Any]]:
    """The losses of a ``conf/loss`` folder.

    Args:
        folder: one YAML a loss; a part that its ``defaults`` name lies in ``<folder>/<part>/<choice>.yaml``.

    Returns:
        Loss name -> dotted key -> value. Interpolations stay as they are written.
    """
    return {file.stem: flat(_composed(file)) for file in sorted(folder.glob("*.yaml"))}


def _composed(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    for entry in content.pop("defaults", []):
        if isinstance(entry, dict):
            for part, choice in entry.items():
                below = file.parent / part / f"{choice}.yaml"
                if choice is not None and below.is_file():
                    content[part] = _composed(below) | (content.get(part) or {})
    return content


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted keys; lists are values."""
    if not isinstance(config, Mapping):
        return {prefix: config}
    return {
        key: value
        for name, below in config.items()
        for key, value in flat(below, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def loss_name(loss: Mapping[str, Any], known: KnownLosses) -> str:
    """The name of the known loss with the same parts; of several the one with the most settings in common.

    A loss of no known composition is called by its parts' class names.
    """
    given = flat(loss)
    parts = _parts(given)
    same = {name: settings for name, settings in known.items() if _parts(settings) == parts}
    if same:
        return max(same, key=lambda name: sum(given.get(key) == value for key, value in same[name].items()))
    return "/".join(str(value).rsplit(".", 1)[-1] for value in parts.values()) or "unknown loss"


def _parts(settings: Mapping[str, Any]) -> dict[str, Any]:
    # A treatment that does nothing is in some of the older configs left out altogether.
    return {
        key: value for key, value in settings.items() if key.endswith("_target_") and ".treatment." not in f".{key}"
    }
