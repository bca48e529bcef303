"""Names resolved loss configs: by the YAML in ``conf/loss`` that a config comes from, and its chosen parts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deltakd.config.folders import config_folders

#: Dotted key -> value, with interpolations unresolved.
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class KnownLosses:
    """The losses of a ``conf/loss`` folder, and their choices.

    Args:
        losses: name -> settings.
        choices: part (``target``, ``divergence``, ``matching``) -> choice -> its settings, keys from the loss's top.
    """

    losses: Mapping[str, Settings] = field(default_factory=dict)
    choices: Mapping[str, Mapping[str, Settings]] = field(default_factory=dict)


def known_losses() -> KnownLosses:
    """Read the losses of all config folders."""
    return read_losses(*(folder / "loss" for folder in config_folders()))


def read_losses(*folders: Path) -> KnownLosses:
    """Read the losses of ``conf/loss`` folders; the first folder that has a file wins.

    Args:
        folders: one YAML per loss; a part that its ``defaults`` name is in ``<folder>/<part>/<choice>.yaml``. Files
            outside the first folder that are not losses, or can't be read, are skipped: they may belong to another
            program.
    """
    # Read as plain YAML: composing all of them takes seconds, and a report needs only this.
    losses = {file.stem: flat(content) for file, content in _each("", folders)}
    parts = sorted({part.name for folder in folders if folder.is_dir() for part in folder.iterdir() if part.is_dir()})
    choices = {
        part: {file.stem: flat(content, part) for file, content in _each(part, folders)}
        for part in parts
        if part != "treatment"
    }
    return KnownLosses(losses, {part: found for part, found in choices.items() if found})


def _each(part: str, folders: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    seen: set[str] = set()
    for folder in folders:
        for file in sorted((folder / part).glob("*.yaml")):
            if file.stem in seen:
                continue
            seen.add(file.stem)
            try:
                yield file, _composed(file, folders)
            except (OSError, StopIteration, ValueError, KeyError, AttributeError, TypeError, yaml.YAMLError):
                if folder == folders[0]:
                    raise


def _composed(file: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Return a YAML merged with its ``defaults``; for a ``_global_`` package only its loss section."""
    text = file.read_text(encoding="utf-8")
    own = yaml.safe_load(text) or {}
    defaults = own.pop("defaults", [])
    if text.startswith("# @package _global_"):
        own = own["loss"]
        own = own if file.parent in folders else own[file.parent.name]
    content: dict[str, Any] = {}
    for entry in defaults:
        if isinstance(entry, dict):
            for group, choice in entry.items():
                # `target`, or `/loss/treatment@treatment`: a group of conf/loss, and where it goes.
                name, _, place = group.removeprefix("/loss/").partition("@")
                base = next(found for folder in folders if (found := folder / name / f"{choice}.yaml").is_file())
                content[(place or name).rpartition(".")[2]] = _composed(base, folders)
    return _merged(content, own)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        there = merged.get(key)
        merged[key] = _merged(there, value) if isinstance(there, dict) and isinstance(value, dict) else value
    return merged


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to dotted keys; lists are values."""
    if not isinstance(config, Mapping):
        return {prefix: config}
    return {
        key: value
        for name, below in config.items()
        for key, value in flat(below, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def loss_name(loss: Mapping[str, Any], known: KnownLosses) -> str:
    """Name a resolved loss config: ``delta_kd``, or ``delta_kd + todi`` if a part differs from the YAML's choice.

    Unknown parts and losses are named by their class.
    """
    return _identify(flat(loss), known)[0]


def delta_weight_keys(loss: Mapping[str, Any], known: KnownLosses) -> frozenset[str]:
    """Return the keys of a resolved loss config that copy the config's ``delta_weight``."""
    return frozenset(key for key, value in _identify(flat(loss), known)[1].items() if value == "${delta_weight}")


def _identify(given: Settings, known: KnownLosses) -> tuple[str, Settings]:
    """Return a loss's name, and its settings as the YAML writes them."""
    candidates = [
        (name, settings) for name, settings in known.losses.items() if settings.get("_target_") == given.get("_target_")
    ]
    if not candidates:
        classes = [_last(value) for value in _classes(given).values()]
        return "/".join(classes) or "unknown loss", _as_named(given)

    def distance(of: tuple[str, Settings]) -> tuple[int, list[str], int, int]:
        # Alphabetical order of the parts works: a loss keeps its name with a new divergence, but not with a new target.
        name, settings = of
        others = [part for part in sorted(known.choices) if _differ(part, given, settings)]
        return len(others), others, -_common(given, _without(others, settings)), len(name)

    name, written = min(candidates, key=distance)
    others = {part: _choice(part, given, known) for part in known.choices if _differ(part, given, written)}
    written = _without(others, written)
    for _, settings in others.values():
        written |= settings
    return " + ".join([name, *(choice for choice, _ in others.values())]), written


def _without(parts: Collection[str], settings: Settings) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key.partition(".")[0] not in parts}


def _choice(part: str, given: Settings, known: KnownLosses) -> tuple[str, Settings]:
    of_class = {
        choice: settings
        for choice, settings in known.choices[part].items()
        if settings.get(f"{part}._target_") == given.get(f"{part}._target_")
    }
    if not of_class:
        return _last(given.get(f"{part}._target_", f"no {part}")), _as_named(given, f"{part}.")
    choice = max(of_class, key=lambda choice: _common(given, of_class[choice]))
    return choice, of_class[choice]


def _as_named(given: Settings, prefix: str = "") -> dict[str, Any]:
    """Guess from the keys of settings without a known YAML which of them copy ``delta_weight``."""
    keys = [key for key in given if key.startswith(prefix) and f".{key}".endswith(".delta_weight")]
    return dict.fromkeys(keys, "${delta_weight}")


def _classes(settings: Settings) -> dict[str, Any]:
    return {
        key: value for key, value in settings.items() if key.endswith("_target_") and ".treatment." not in f".{key}"
    }


def _differ(part: str, one: Settings, other: Settings) -> bool:
    return one.get(f"{part}._target_") != other.get(f"{part}._target_")


def _common(one: Settings, other: Settings) -> int:
    return sum(one.get(key) == value for key, value in other.items())


def _last(value: object) -> str:
    return str(value).rpartition(".")[2]
