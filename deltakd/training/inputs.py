"""Fingerprints of a run's inputs: a resumed run must read the same ones.

A config names files, not their content. ``inputs.json`` in the run directory records what the first start read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltakd.data import LoadedSets, tokenizer_fingerprint
from deltakd.data.encoding.token_cache import fingerprint
from deltakd.io.errors import ConfigError
from deltakd.io.files import write_json
from deltakd.models.identity import model_version
from deltakd.references import CachedReferences, ServedReferences
from deltakd.training.settings import RunSettings

log = logging.getLogger(__name__)

#: In the run directory.
INPUTS = "inputs.json"

#: Shards of a stream in a message.
SHOWN_SHARDS = 5

#: How an input differs; a model's files have changed.
_HOW = {
    "data.train": "the rows are others",
    "data.val": "the rows are others",
    "tokenizer": "the tokens are others",
    "teachers' tokenizer": "the tokens are others",
    "reference": "the references are others",
}


def read_inputs(
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    sets: LoadedSets,
    elsewhere: CachedReferences | ServedReferences | None,
    teachers: PreTrainedTokenizerBase | None = None,
) -> dict[str, str | None]:
    """Return input -> sha256 or commit; None if it is unknown.

    Args:
        settings: of the run.
        tokenizer: the student's.
        sets: tokenised rows; what is trained on depends on the tokenizer, too.
        elsewhere: references that are cached or served, if the run uses them: then it does not read their models.
        teachers: the teachers' tokenizer, if they have one of their own.
    """
    inputs = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data.train": sets.train.fingerprint or None,
        "data.val": None if sets.val is None else sets.val.fingerprint or None,
    }
    inputs |= {} if teachers is None else {"teachers' tokenizer": tokenizer_fingerprint(teachers)}
    inputs |= {
        f"model.{role}": model_version(spec.path) if spec.init == "pretrained" and spec.path else None
        for role, spec in settings.specs.items()
    }
    return inputs if elsewhere is None else inputs | {"reference": fingerprint(_lasting(elsewhere.content))}


def check_inputs(
    directory: Path, inputs: Mapping[str, str | None], shards: Mapping[str, str] | None = None, *, force: bool
) -> None:
    """Record the run's inputs, or compare them with those of its first start.

    Args:
        directory: of the run.
        inputs: as ``read_inputs`` gives them.
        shards: of streamed data, each with what identifies its content; together they identify ``data.train``.
        force: continue with other inputs; ``changed_inputs`` lists them from then on.

    Raises:
        ConfigError: names every input that has changed since.
        WriteError: the disk failed.
    """
    held = _read(directory)
    before: dict[str, str | None] = held.get("inputs", {})
    changed = _shard_changes(held.get("shards", {}), shards or {})
    apart = ("data.train",) if changed else ()
    changed += [
        f"{name}: {_HOW.get(name, 'its files are others')} than when this run began "
        f"({before[name]!s:.12} there, {value:.12} now)"
        for name, value in inputs.items()
        if value is not None and before.get(name) not in (None, value) and name not in apart
    ]
    if changed and not force:
        remedy = (
            f"put back what was there, give another run_dir, or continue in run_dir={directory} with the present "
            "inputs by resume=force"
        )
        raise ConfigError([f"{sentence}; {remedy}" for sentence in changed])
    for sentence in changed:
        log.warning("%s; the run continues with it (resume=force).", sentence)
    # A fingerprint that is unknown now may have been known before.
    known = before | {name: value for name, value in inputs.items() if value is not None or name not in before}
    changed = [*held.get("changed", []), *changed]
    kept = {"inputs": known, "changed": changed} | ({"shards": dict(shards)} if shards else {})
    if kept != held:
        write_json(directory / INPUTS, kept)


def changed_inputs(directory: Path) -> list[str]:
    """Return the inputs that changed before the run was resumed by force, one sentence each."""
    return list(_read(directory).get("changed", []))


def _shard_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return one sentence with the shards that differ, if any."""
    if not before or not now:
        return []
    different = [f"{name} is gone" for name in before if name not in now]
    different += [f"{name} is new" for name in now if name not in before]
    different += [
        f"{name} has changed ({version} there, {now[name]} now)"
        for name, version in before.items()
        if now.get(name, version) != version
    ]
    if not different:
        return []
    more = f" and {len(different) - SHOWN_SHARDS} more" if len(different) > SHOWN_SHARDS else ""
    return [f"data.train: the shards are others than when this run began: {', '.join(different[:SHOWN_SHARDS])}{more}"]


def _read(directory: Path) -> dict[str, Any]:
    path = directory / INPUTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _lasting(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the content of references that determines their numbers, without the models' former paths."""
    models = {role: {k: v for k, v in model.items() if k != "path"} for role, model in content["models"].items()}
    lasting = {key: content[key] for key in ("store", "vocabulary", "k", "temperature")} | {"models": models}
    return lasting | {key: content[key] for key in ("other", "routes") if content.get(key)}
