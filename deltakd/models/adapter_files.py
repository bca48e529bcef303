"""A tuned teacher given as an adapter on its raw teacher: checks that read no weights, and need no peft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltakd.models.identity import model_version
from deltakd.models.settings import ModelSpec
from deltakd.types import is_reference_role
from deltakd.types.role_names import STUDENT, raw_role_of

#: Files of a PEFT adapter.
_CONFIG, _WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
#: Written beside an exported adapter: the path of its base model, and what identifies that model's files.
BASE_FILE = "base_model.json"


def with_base(specs: Mapping[str, ModelSpec]) -> dict[str, ModelSpec]:
    """Return the specs in which a teacher given by its adapter alone gets the rest from its raw teacher."""
    found = dict(specs)
    for role, spec in specs.items():
        raw = specs.get(raw_role_of(role) or "")
        if spec.adapter is not None and spec.path is None and spec.init == "pretrained" and raw is not None:
            found[role] = replace(raw, adapter=spec.adapter, tokenizer=spec.tokenizer or raw.tokenizer)
    return found


def base_of(spec: ModelSpec) -> ModelSpec:
    """Return the model under the adapter. Roles with equal bases share one set of weights."""
    return replace(spec, adapter=None)


def shared_weights(references: Mapping[str, ModelSpec]) -> dict[str, str]:
    """Return role -> earlier role that already holds its weights, under the adapter if it has one."""
    roles = list(references)
    found = {}
    for number, role in enumerate(roles):
        owner = next((one for one in roles[:number] if base_of(references[one]) == base_of(references[role])), None)
        if owner is not None:
            found[role] = owner
    return found


def adapter_bytes(spec: ModelSpec) -> int:
    """Return the size of an adapter's weights on disk."""
    if spec.adapter is None:
        return 0
    return sum(file.stat().st_size for name in _WEIGHTS if (file := Path(spec.adapter) / name).is_file())


def adapter_problems(role: str, spec: ModelSpec) -> list[str]:
    """Return the problems with ``model.<role>.adapter``, one sentence each; no weights are read."""
    if spec.adapter is None:
        return []
    key = f"model.{role}.adapter={spec.adapter}"
    if role == STUDENT or not is_reference_role(role):
        return [f"{key}: the student's adapter is trained; give model/lora=default, or merge it into the weights"]
    directory = Path(spec.adapter)
    if not (directory / _CONFIG).is_file() or not any((directory / file).is_file() for file in _WEIGHTS):
        return [
            f"{key} is not a directory with {_CONFIG} and {_WEIGHTS[0]}; give the directory of a PEFT "
            "adapter (a run with model/lora=default writes one to <run_dir>/adapter)"
        ]
    try:
        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
    except (ValueError, KeyError, TypeError):
        return [f"{key}: {_CONFIG} is no PEFT configuration; give the directory of a PEFT adapter"]
    if kind != "LORA":
        return [f"{key} is an adapter of type {kind}, and only LORA is supported; give one, or a merged model as path"]
    changed = _changes_of_base(config)
    if changed:
        return [
            f"{key} changes the base's own weights ({changed}), so switching it off does not give the raw teacher; "
            f"merge it, and give the result as model.{role}.path"
        ]
    return _base_problems(key, directory, str(config.get("base_model_name_or_path") or ""), spec)


def _changes_of_base(config: Mapping[str, Any]) -> str | None:
    """Return the option by which training changed weights outside the adapter; None: it changed none."""
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']}"
    start = config.get("init_lora_weights", True)
    # The others (pissa, olora, corda, loftq, ...) move a part of each matrix into the adapter.
    return None if start in (True, False, "gaussian", "eva", "orthogonal") else f"init_lora_weights={start}"


def _base_problems(key: str, directory: Path, named: str, spec: ModelSpec) -> list[str]:
    """Return a sentence if the adapter was made for a model other than the spec's, as far as its files say."""
    remedy = "give the model that it was trained on as the raw teacher, or the adapter that belongs to this model"
    record = directory / BASE_FILE
    if record.is_file():
        base = json.loads(record.read_text(encoding="utf-8"))
        here = model_version(str(spec.path))
        if base["version"] and here and base["version"] != here:
            return [
                f"{key} belongs to another base: {base['path']} ({base['version'][:12]}), and the model is {spec.path} "
                f"({here[:12]}); {remedy}"
            ]
        return []
    # A hub id and a local copy of it differ in everything but the last part.
    if named and spec.path and Path(named).name != Path(spec.path).name:
        return [
            f"{key} belongs to another base: its {_CONFIG} names {named}, and the model is {spec.path}; {remedy} "
            "(if they are the same model, correct base_model_name_or_path there)"
        ]
    return []
