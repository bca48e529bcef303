"""Composing configs with Hydra; for a typo in an override, naming the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from deltakd.distributed.launchers import launcher_problems
from deltakd.io.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
#: conf/ of the installed wheel, or of the checkout.
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

#: Renamed keys: old -> new.
RENAMED_KEYS = {
    "loss.target.alpha": "loss.target.delta_weight",
    "loss.target.beta": "loss.target.delta_weight",
    "loss.target.u": "loss.target.delta_weight",
    "loss.gamma": "loss.delta_weight",
    "loss.alpha": "loss.delta_weight",
}


def compose_config(name: str, overrides: Sequence[str], checked: bool = False) -> DictConfig:
    """Compose ``conf/<name>.yaml`` with overrides.

    Args:
        name: of the base config.
        overrides: Hydra overrides.
        checked: skip ``check_overrides``, which takes longer than composing: these keys have passed it.

    Raises:
        ConfigError: an override has an unknown key or choice; the nearest one is named.
    """
    if not checked:
        check_overrides(name, overrides)
    return _compose(name, overrides)


def _compose(name: str, overrides: Sequence[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose(name, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_one_line(error)]) from None


def read_mapping(text: str) -> dict[str, Any]:
    """Parse a mapping as in a config, where ``1e-5`` is a number.

    Raises:
        ValueError: it is no mapping.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.create(text))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(_one_line(error)) from None
    if not isinstance(found, dict):
        raise ValueError(f"{text!r} is no mapping")
    return {str(key): value for key, value in found.items()}


def check_overrides(name: str, overrides: Sequence[str]) -> None:
    """Check the keys of all overrides at once, sweeps included.

    Raises:
        ConfigError: lists every unknown key with the nearest existing one.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError([_one_line(error)]) from None
    groups = [o for o in parsed if _is_group(o.key_or_group)]
    problems = [p for override in groups for p in _choice_problems(override)]
    problems += launcher_problems([str(o.value()) for o in parsed if o.key_or_group == "hydra/launcher"])
    if problems:
        raise ConfigError(problems)
    cfg = _compose(name, [str(o.input_line) for o in groups if not o.is_sweep_override()])
    keys = set(_keys(cfg))
    known = sorted({*keys, *_group_names()})
    for override in parsed:
        key = override.key_or_group
        if key in RENAMED_KEYS and key not in keys:
            problems.append(f"{key} is now {RENAMED_KEYS[key]}")
            continue
        fixed = not (_is_group(key) or key.startswith("hydra") or override.is_add() or override.is_force_add())
        if fixed and key not in keys:
            parent = key.rpartition(".")[0]
            if parent in keys and not OmegaConf.select(cfg, parent):
                problems.append(f"{parent} is empty: give it whole as {parent}={{...}}, or add the key as +{key}=...")
                continue
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; the nearest one is {near[0]!r}" if near else ""
            problems.append(f"there is no config key {key!r}{hint}")
    if problems:
        raise ConfigError(problems)


def _choice_problems(override: Override) -> list[str]:
    """Return a sentence for each unknown choice of a config group, with the existing ones."""
    if override.is_sweep_override() or override.is_delete():
        return []
    value: Any = override.value()
    directory = CONF_DIR / override.key_or_group
    allowed = sorted(p.stem for p in directory.glob("*.yaml"))
    if isinstance(value, dict):
        return []
    problems = []
    for choice in map(str, value if isinstance(value, list) else [value]):
        if not (directory / f"{choice}.yaml").is_file():
            near = difflib.get_close_matches(choice, allowed, n=1, cutoff=0.4)
            hint = f"the nearest is {near[0]!r}; " if near else ""
            problems.append(
                f"{override.key_or_group}={choice} does not exist; {hint}allowed: {', '.join(allowed) or 'nothing yet'}"
            )
    return problems


def _group_names() -> list[str]:
    return [str(p.relative_to(CONF_DIR)) for p in CONF_DIR.rglob("*") if p.is_dir()]


def _is_group(key: str) -> bool:
    # Hydra checks its own groups: some of their choices come from plugins.
    return (CONF_DIR / key).is_dir() if "." not in key and not key.startswith("hydra/") else False


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in cfg:
        name = prefix + str(key)
        yield name
        if not OmegaConf.is_interpolation(cfg, str(key)) and isinstance(cfg._get_node(str(key)), DictConfig):
            node = cfg._get_node(str(key))
            assert isinstance(node, DictConfig)
            if not node._is_none():
                yield from _keys(node, f"{name}.")


def _one_line(error: Exception) -> str:
    nested = re.match(r"Could not override '(\w+)/(\w+)'\. No match", str(error))
    if nested:
        parent, part = nested.groups()
        return (
            f"{parent}/{part} can't be chosen: the chosen {parent} has no {part}; conf/{parent}/ says which ones have"
        )
    return " ".join(str(error).split())
