"""Saves rows and models given as objects to files, so that a run's config can name them and the run can restart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltakd.io.files import replacing, write_text
from deltakd.models.saving import save_weights


@dataclass(frozen=True)
class Given:
    """Where objects are saved, and with which tokenizer.

    Args:
        folder: holds files and models, named by their content.
        tokenizer: saved with models; None: each model's own, by its name.
    """

    folder: Path
    tokenizer: Any = None


def as_source(name: str, value: Any, given: Given, problems: list[str]) -> Any:
    """Return a source as the config should name it: rows are written to a file named by their content.

    Args:
        name: of the argument.
        value: a path, a list of paths, a mapping with a ``source``, or rows: dicts, ``datasets.Dataset``, a DataFrame.
        given: where rows are kept.
        problems: gets one sentence for each problem.
    """
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping) and isinstance(value.get("source"), str):
        return dict(value)
    kinds = "a file, a list of files, rows as a list of dicts, a datasets.Dataset or a pandas.DataFrame"
    if isinstance(value, Mapping):
        splits = ", ".join(map(str, value))
        problems.append(f"{name} is a mapping with {splits}; give one of its values, or {kinds}")
        return None
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        value = value.to_dict("records")
    if not isinstance(value, Iterable):
        problems.append(f"{name} is a {type(value).__name__}; give {kinds}")
        return None
    entries = list(value)
    if entries and all(isinstance(entry, str | os.PathLike) for entry in entries):
        return [os.fspath(entry) for entry in entries]
    wrong = next((n for n, entry in enumerate(entries) if not isinstance(entry, Mapping)), None)
    if not entries or wrong is not None:
        found = "empty" if wrong is None else f"a list with {entries[wrong]!r:.60} at {wrong}"
        problems.append(f"{name} is {found}; give {kinds}")
        return None
    return _written(name, entries, given, problems)


def _written(name: str, rows: Sequence[Mapping[str, Any]], given: Given, problems: list[str]) -> str | None:
    try:
        text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    except (TypeError, ValueError) as error:
        problems.append(
            f"{name}: a row can't be written as JSON: {' '.join(str(error).split())}; "
            "give text, numbers, lists and dicts"
        )
        return None
    path = (given.folder / "rows" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl").absolute()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return str(path)


def saved_model(role: str, value: Any, given: Given, problems: list[str]) -> Any:
    """Return a model's hub id or directory; a loaded model is saved to a directory named by its weights.

    Args:
        role: of the model.
        value: a hub id, a directory, or a ``transformers`` model.
        given: where models are kept, and their tokenizer.
        problems: gets one sentence for each problem.
    """
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if hasattr(value, "peft_config"):
        problems.append(f"{role} is a model with a PEFT adapter; give {role}=model.merge_and_unload()")
        return None
    if not (hasattr(value, "save_pretrained") and hasattr(value, "state_dict") and hasattr(value, "config")):
        problems.append(f"{role} is a {type(value).__name__}; give a hub id, a directory or a transformers model")
        return None
    path = (given.folder / "models" / _fingerprint(value)).absolute()
    if path.is_dir():
        return str(path)
    tokenizer = given.tokenizer or _own_tokenizer(value)
    if tokenizer is None:
        problems.append(f"{role} is a loaded model that does not know its tokenizer; give tokenizer=...")
        return None
    with replacing(path, f"the copy of {role}") as partial:
        save_weights(value, partial)
        tokenizer.save_pretrained(partial)
    return str(path)


def _own_tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name) if name else None
    # Neither its directory nor the hub has a tokenizer.
    except (OSError, ValueError):
        return None


def _fingerprint(model: Any) -> str:
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
