"""Composes configs with Hydra; for a typo in an override, names the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from deltakd.config.folders import CONF_DIR, choice_files, choices, config_folders, group_names, is_group
from deltakd.distributed.launchers import launcher_problems
from deltakd.io.errors import ConfigError

#: Renamed keys: old -> new.
RENAMED_KEYS = {
    "loss.target.alpha": "loss.target.delta_weight",
    "loss.target.beta": "loss.target.delta_weight",
    "loss.target.u": "loss.target.delta_weight",
    "loss.gamma": "loss.delta_weight",
    "loss.alpha": "loss.delta_weight",
}


class ConfigFolders(SearchPathPlugin):
    """Tells Hydra the user's folders in every case: ``hydra.main``, the jobs of a multirun, ``compose``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folders after the package's own."""
        for folder in config_folders()[1:]:
            search_path.append("deltakd", f"file://{folder}")


def register_folders() -> None:
    """Let Hydra find the configs in the user's folders."""
    plugins = Plugins.instance()
    if ConfigFolders not in plugins.discover(SearchPathPlugin):
        plugins.register(ConfigFolders)


def compose_config(name: str, overrides: Sequence[str], checked: bool = False) -> DictConfig:
    """Compose ``conf/<name>.yaml`` with overrides; group choices may be in the user's folders.

    Args:
        name: of the base config.
        overrides: Hydra overrides.
        checked: the keys have passed ``check_overrides``; skip it, since it takes longer than composing.

    Raises:
        ConfigError: an override has an unknown key or choice; the nearest one is named.
    """
    if not checked:
        check_overrides(name, overrides)
    return _compose(name, overrides)


def _compose(name: str, overrides: Sequence[str]) -> DictConfig:
    # The caller may use Hydra itself, so restore its state.
    hydra = GlobalHydra.instance()
    before, hydra.hydra = hydra.hydra, None
    register_folders()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose(name, whole_mappings(overrides))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError([_one_line(error)]) from None
    finally:
        hydra.hydra = before


def set_values(cfg: DictConfig, values: Mapping[str, Any], problems: list[str]) -> None:
    """Set keys of a composed config to values from Python, which need no quoting.

    Args:
        cfg: changed.
        values: dotted key -> value.
        problems: gets one sentence for each unknown key, with the nearest one.
    """
    keys = list(_keys(cfg))
    for key, value in values.items():
        parent = key.rpartition(".")[0]
        if key in RENAMED_KEYS and key not in keys:
            problems.append(f"{key} is now {RENAMED_KEYS[key]}")
        # What lies below an empty mapping, such as schedule_options, has no keys to be known by.
        elif key not in keys and not (parent in keys and OmegaConf.select(cfg, parent) in ({}, None)):
            problems.append(_no_key(key, keys))
        else:
            with open_dict(cfg):
                OmegaConf.update(cfg, key, value, merge=False)


def whole_mappings(overrides: Sequence[str]) -> list[str]:
    """Return the overrides in a form that allows mappings with the user's own keys: ``data.sets={mine: my.jsonl}``.

    Hydra rejects keys that the config lacks, even inside mappings, but accepts ``++data.sets={...}``. Where only known
    keys are allowed, building the settings rejects the others by name.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [f"++{text}" if _is_whole_mapping(o) else text for text, o in zip(overrides, parsed, strict=True)]


def _is_whole_mapping(override: Override) -> bool:
    plain = override.type is OverrideType.CHANGE and not override.is_sweep_override()
    return plain and isinstance(override.value(), dict) and not is_group(override.key_or_group)


def read_mapping(text: str) -> dict[str, Any]:
    """Parse a mapping as in a config, where ``1e-5`` is a number.

    Raises:
        ValueError: it is not a mapping.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.create(text))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(_one_line(error)) from None
    if not isinstance(found, dict):
        raise ValueError(f"{text!r} is not a mapping")
    return {str(key): value for key, value in found.items()}


def _how_to_quote(overrides: Sequence[str]) -> str:
    """Return how to write the first override that Hydra can't parse, such as a source with ``#field=value``."""
    for text in overrides:
        key, _, value = text.partition("=")
        if _parses(text) or not value:
            continue
        if value[0] in "[{":
            return "; put each text in the list or mapping that has special characters, such as #, into double quotes"
        quoted = f'{key}="{value}"'
        return f"; put the value into double quotes, and all into single ones: '{quoted}'" if _parses(quoted) else ""
    return ""


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_overrides([override])
    except HydraException:
        return False
    return True


def check_overrides(name: str, overrides: Sequence[str]) -> None:
    """Check the keys of all overrides at once, sweeps included.

    Raises:
        ConfigError: lists every unknown key with the nearest existing one.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError([_one_line(error) + _how_to_quote(overrides)]) from None
    groups = [o for o in parsed if is_group(o.key_or_group)]
    problems = [p for override in groups for p in _choice_problems(override)]
    problems += launcher_problems([str(o.value()) for o in parsed if o.key_or_group == "hydra/launcher"])
    if problems:
        raise ConfigError(problems)
    # Of a sweep over a group, the first choice stands for the others.
    cfg = _compose(name, [text for o in groups for text in _first(o)])
    problems += _unread(cfg, name)
    keys = set(_keys(cfg))
    known = sorted({*keys, *group_names()})
    for override in parsed:
        key = override.key_or_group
        if key in RENAMED_KEYS and key not in keys:
            problems.append(f"{key} is now {RENAMED_KEYS[key]}")
            continue
        fixed = not (is_group(key) or key.startswith("hydra") or override.is_add() or override.is_force_add())
        if fixed and key not in keys:
            parent = key.rpartition(".")[0]
            if parent in keys and not OmegaConf.select(cfg, parent):
                problems.append(f"{parent} is empty: give it whole as {parent}={{...}}, or add the key as +{key}=...")
                continue
            problems.append(_no_key(key, known))
    if problems:
        raise ConfigError(problems)


def _unread(cfg: DictConfig, name: str) -> list[str]:
    """Return a sentence for each key at the top of an experiment that nothing reads; values copied from it do."""
    base = OmegaConf.load(CONF_DIR / f"{name}.yaml")
    known = {*map(str, base), *(group.partition("/")[0] for group in group_names())}
    strange = [str(key) for key in cfg if str(key) not in known]
    text = OmegaConf.to_yaml(cfg) if strange else ""
    problems = []
    for key in strange:
        if not re.search(rf"\$\{{{re.escape(key)}[.}}]", text):
            problems.append(_no_key(key, known))
    return problems


def _choice_problems(override: Override) -> list[str]:
    """Return a sentence for each unknown choice of a config group, with the existing ones."""
    group, problems = override.key_or_group, list[str]()
    if override.value() is None and not override.is_delete():
        return [f"{group}=null is not a choice; leave it out, or give one of: {', '.join(choices(group))}"]
    for choice in _choices_named(override):
        files = choice_files(group, choice)
        problems += [] if files else [_no_choice(group, choice)]
        problems += [f"{group}={choice} means {files[0]}, which hides {file}; rename that one" for file in files[1:]]
    return problems


def _choices_named(override: Override) -> list[str]:
    if override.is_sweep_override():
        # Hydra itself expands a glob, when the sweep starts.
        listed = override.is_discrete_sweep() and not isinstance(override.value(), Glob)
        return list(override.sweep_string_iterator()) if listed else []
    value: Any = override.value()
    if override.is_delete() or isinstance(value, dict):
        return []
    return [str(choice) for choice in (value if isinstance(value, list) else [value])]


def _first(override: Override) -> list[str]:
    """Return an override, or the first one of its sweep; a sweep that lists no values has none."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in _choices_named(override)[:1]]


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
    # Drop the search path that Hydra prints after the choices: it does not help users.
    absent = re.match(r"In '(\S+)': Could not find '(\S+)/(\S+?)'", str(error))
    if absent and is_group(absent[2]):
        file, group, choice = absent.groups()
        return f"{_no_choice(group, choice)}; it is in the defaults of {file if file != 'train' else 'the experiment'}"
    return " ".join(str(error).split())


def _no_key(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"; the nearest one is {near[0]!r}" if near else ""
    return f"there is no config key {key!r}{hint}"


def _no_choice(group: str, choice: str) -> str:
    allowed = choices(group)
    near = difflib.get_close_matches(choice, allowed, n=1, cutoff=0.4)
    hint = f"the nearest is {near[0]!r}; " if near else ""
    return f"{group}={choice} does not exist; {hint}allowed: {', '.join(allowed) or 'nothing yet'}"
