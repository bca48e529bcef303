"""Turns a composed config into typed settings: the only place where a config becomes objects.

All problems are reported at once, before any weights are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deltakd.config.check import specs_to_load
from deltakd.config.check_caching import caching_problems
from deltakd.config.check_serving import serving_problems
from deltakd.config.draft import Draft
from deltakd.config.folders import choice_files
from deltakd.data import TextData
from deltakd.data.encoding.template_problems import template_problems
from deltakd.distributed.launchers import alone_problems, launch_problems, read_launch
from deltakd.distributed.ranks import is_main_process
from deltakd.distributed.settings import StrategySettings
from deltakd.io.errors import ConfigError
from deltakd.io.typed import typed
from deltakd.references.content import cache_problems
from deltakd.tracking.loggers import logger_problems
from deltakd.training.settings import RunSettings, StepSettings
from deltakd.types import TEACHER


def make_settings(cfg: DictConfig, *, on_this_machine: bool = True) -> RunSettings:
    """Check a composed config for a training run, and make its settings.

    Args:
        cfg: the config.
        on_this_machine: require its devices to be on this machine; False for estimates.

    Raises:
        ConfigError: every problem found, one sentence each.
    """
    draft = Draft(resolved(cfg), copied_keys(cfg))
    roles: Collection[str] | None
    if draft.cache is not None and draft.loss is not None and draft.loss.requires:
        draft.problems += cache_problems(draft.model, draft.loss, draft.cache)
        roles = ()
    elif draft.served is not None and draft.loss is not None:
        draft.problems += serving_problems(draft.loss, draft.rollout)
        roles = ()
    else:
        roles = None if draft.loss is None else draft.loss.requires
    if not draft.dry_run:
        if on_this_machine:
            draft.check_devices()
            # Other ranks log nothing, and need no key.
            draft.problems += logger_problems(draft.logger) if is_main_process() else []
        launch = read_launch(os.environ)
        if draft.trainer is not None:
            draft.problems += launch_problems(launch, draft.trainer.devices, draft.trainer.num_nodes)
    return draft.settings(roles, has_adapter=draft.model.lora is not None)


def make_caching_settings(cfg: DictConfig) -> RunSettings:
    """Check a composed config for ``deltakd.cache``, which loads the references of the loss and stores their output.

    Raises:
        ConfigError: every problem found, one sentence each.
    """
    draft = Draft(resolved(cfg), copied_keys(cfg))
    draft.problems += caching_problems(draft.reference, draft.model, draft.loss)
    draft.check_alone()
    roles = None if draft.loss is None else set(draft.loss.requires)
    if roles is not None and draft.cache is not None:
        roles -= draft.cache.outside
    # A cache's raw student is a separate model, not a student with its adapter off.
    return draft.settings(roles, has_adapter=False)


def make_serving_settings(cfg: DictConfig) -> RunSettings:
    """Check a composed config for ``deltakd.serve``, which loads the references of the loss; no data is read.

    Raises:
        ConfigError: every problem found, one sentence each.
    """
    draft = Draft(resolved(cfg), copied_keys(cfg))
    draft.check_alone(several=True)
    draft.check_transport()
    roles: Collection[str] | None = None
    if draft.reference is not None and draft.served is None:
        draft.problems.append("reference is not a server; add reference=served reference.url=tcp://127.0.0.1:7711")
    if draft.loss is not None:
        roles = draft.loss.requires
        draft.problems += serving_problems(draft.loss, draft.rollout)
        if not roles:
            draft.problems.append(
                "the loss reads no references, so there is nothing to serve; give the loss that will be trained"
            )
    return draft.settings_of_models(roles)


def make_answering_settings(cfg: DictConfig) -> RunSettings:
    """Check a composed config for ``deltakd.generate``, in which the teacher answers the training prompts.

    Raises:
        ConfigError: every problem found, one sentence each.
    """
    draft = Draft(resolved(cfg), copied_keys(cfg))
    if isinstance(draft.data, TextData):
        draft.problems.append(
            "data is plain text, which has no prompts to answer; give data=instruction and data.train=..."
        )
    elif draft.data is not None and draft.data.streaming:
        draft.problems.append(
            "data.streaming=true, but the teacher answers the prompts of an indexed data set; give "
            "data.streaming=false, and data.limit=N if there are too many"
        )
    if draft.model.routes:
        draft.problems.append(
            "model.routes has a teacher for each task, and deltakd.generate one for all prompts; leave it out, and let "
            "each teacher answer its task's rows: data.train=FILE#task=NAME"
        )
    draft.check_alone()
    return draft.settings({TEACHER}, has_adapter=draft.model.lora is not None, any_tokenizer=True)


def make_evaluation_settings(cfg: DictConfig) -> RunSettings:
    """Check a composed config for ``deltakd.evaluate``, which trains nothing and requires no references.

    Raises:
        ConfigError: every problem found, one sentence each.
    """
    draft = Draft(resolved(cfg), copied_keys(cfg))
    draft.problems += alone_problems(read_launch(os.environ))
    if draft.evaluation is not None:
        draft.problems += draft.evaluation.problems(draft.data)
        draft.problems += template_problems("data.template", draft.data.template) if draft.data is not None else []
        if not draft.evaluation.sets:
            draft.problems.append("nothing to evaluate; give 'evaluation.sets={name: file.jsonl}'")
    if draft.problems:
        raise ConfigError(draft.problems)
    return draft.made({})


def make_step_settings(cfg: DictConfig) -> StepSettings:
    """Make the settings that the cost of a step depends on; paths of models and data are not checked.

    Raises:
        ConfigError: values of the wrong type.
    """
    draft = Draft(resolved(cfg), copied_keys(cfg))
    if draft.problems:
        raise ConfigError(draft.problems)
    assert draft.trainer is not None
    assert draft.kernels is not None
    assert draft.rollout is not None
    return StepSettings(draft.loss, draft.data, draft.model, draft.trainer, draft.kernels, draft.rollout)


def read_strategy(name: str) -> StrategySettings:
    """Read ``conf/strategy/<name>.yaml``."""
    file = choice_files("strategy", name)[0]
    made = typed(StrategySettings, OmegaConf.to_container(OmegaConf.load(file)), "strategy", [])
    assert made is not None, f"{file} is wrong"
    return made


def stored_settings(path: Path) -> RunSettings:
    """Make the settings of a finished run from its ``config.yaml``; its models and data may be gone.

    Raises:
        ConfigError: the file can't be read, or was written by an incompatible version.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([f"{path} can't be read: {' '.join(str(error).split())}"]) from None
    if not isinstance(config, dict):
        raise ConfigError([f"{path} is not a mapping; give the config.yaml of a run"])
    draft = Draft(config)
    if draft.problems:
        raise ConfigError([f"{path}: {problem}" for problem in draft.problems])
    return draft.made(specs_to_load(draft.model, draft.loss.requires, draft.model.lora is not None, []))


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as plain dicts and lists, interpolations resolved; ``data.sets`` is the default evaluation.

    Raises:
        ConfigError: an interpolation can't be resolved, or a mandatory value is missing.
    """
    try:
        config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([" ".join(str(error).split())]) from None
    config = _with_text_keys(config)
    if isinstance(config.get("evaluation"), dict) and isinstance(config.get("data"), dict):
        config["evaluation"]["sets"] = config["evaluation"].get("sets") or config["data"].get("sets") or {}
    return config


def _with_text_keys(value: Any) -> Any:
    """Return a config in which the keys of all mappings are texts: ``{0: a}`` names the same as ``{"0": a}``."""
    if isinstance(value, dict):
        return {_key_text(key): _with_text_keys(entry) for key, entry in value.items()}
    return [_with_text_keys(entry) for entry in value] if isinstance(value, list) else value


def _key_text(key: Any) -> str:
    # As it is written in YAML.
    return str(key).lower() if isinstance(key, bool) else "null" if key is None else str(key)


def copied_keys(cfg: DictConfig, prefix: str = "") -> set[str]:
    """Return the dotted keys whose value is copied from another key."""
    found: set[str] = set()
    for key in cfg:
        name = prefix + str(key)
        # Hydra reads {0: a} as a mapping of numbers.
        own: Any = key
        if OmegaConf.is_interpolation(cfg, own):
            found.add(name)
        elif isinstance(node := cfg._get_node(own), DictConfig) and not node._is_none():
            found |= copied_keys(node, f"{name}.")
    return found
