"""The inputs that determine a cache's content; a run with different ones is rejected, with each difference named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, EncodedSet, LoadedSets, tokenizer_fingerprint
from deltakd.data.encoding.token_cache import fingerprint
from deltakd.io.wording import listed
from deltakd.models import ModelSettings, ModelSpec
from deltakd.models.identity import model_identity, spec_of
from deltakd.references import CacheSettings, CacheStore, StoreError
from deltakd.references.index import RowIndex, keys_of_rows, keys_of_set
from deltakd.references.routed import routed_roles
from deltakd.references.topk import topk_problems
from deltakd.types import STUDENT, STUDENT_RAW, Loss, teacher_pair


def data_identity(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sets: LoadedSets,
    teachers: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Return fingerprints of everything that determines the rows and their tokens.

    Args:
        data: the group ``data``.
        tokenizer: the student's.
        sets: tokenised rows.
        teachers: the teachers' tokenizer, if they have one of their own.
    """
    found = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": fingerprint(repr(data.make_template(tokenizer))),
        "data": data.identity,
        "sets": {"train": sets.train.fingerprint, "val": None if sets.val is None else sets.val.fingerprint},
    }
    reader = sets.image_reader
    if reader is not None:
        found["processor"] = fingerprint(reader.identity)
    if teachers is not None:
        template = data.teachers_coding(teachers).template
        found["other"] = {"tokenizer": tokenizer_fingerprint(teachers), "template": fingerprint(repr(template))}
    return found


def cache_problems(models: ModelSettings, loss: Loss, settings: CacheSettings, adding: bool = False) -> list[str]:
    """Return why a run may not use its cache, as far as the config shows, one sentence each.

    Args:
        models: the group ``model``.
        loss: of the run.
        settings: the group ``reference``.
        adding: True if rows will be added to the cache, which needs the models of all its roles.
    """
    if not settings.path:
        return []
    try:
        content = CacheStore.open(Path(settings.path)).manifest.content
    except StoreError as error:
        return [str(error)]
    problems = _store_problems(content, loss, settings) + _route_problems(content, models, settings.path)
    if bool(models.routes) != bool(content.get("routes")):
        # The roles of the cache are then those of other pairs.
        return problems
    held = content["models"]
    read = set(routed_roles(loss.requires, models.routes.values()) if models.routes else loss.requires)
    missing = sorted(read - set(held))
    if missing:
        problems.append(
            f"the loss reads {', '.join(missing)}, but the cache reference.path={settings.path} was made for "
            f"{', '.join(held)} alone; make another one with this loss, in another directory"
        )
    if adding and set(held) - read:
        problems.append(
            f"the cache reference.path={settings.path} holds {', '.join(held)}; to add rows or to make files again "
            "give a loss that reads them all"
        )
    for role in sorted(read & set(held)):
        problems += cached_model_problems(role, spec_of(models, role), held[role], settings.path)
    if STUDENT_RAW in loss.requires and models.specs[STUDENT].init == "random":
        problems.append("the loss reads student_raw, but a student with init=random has no raw self; give it a path")
    return problems


def _store_problems(content: Mapping[str, Any], loss: Loss, settings: CacheSettings) -> list[str]:
    """Return mismatches in the kind of store, K and temperature."""
    found = []
    if settings.store is not None and settings.store != content["store"]:
        found.append(differs("reference.store", settings.store, content["store"], settings.path))
    if content["store"] != "topk":
        return found
    if settings.k is not None and min(settings.k, content["vocabulary"]) != content["k"]:
        found.append(differs("reference.k", settings.k, content["k"], settings.path))
    if loss.temperature != content["temperature"]:
        found.append(
            differs("loss.temperature", loss.temperature, content["temperature"], settings.path)
            + " (reference.store=hidden serves every temperature)"
        )
    return found + topk_problems(loss)


def _route_problems(content: Mapping[str, Any], models: ModelSettings, path: str | None) -> list[str]:
    """Return how ``model.routes`` differs from the cached one, one sentence for each task; one if either has none."""
    here, there = models.routes or None, content.get("routes")
    if here is None or there is None:
        return [] if here is there else [differs("model.routes", _shown(here), _shown(there), path)]
    return [
        differs(f"model.routes.{task}", _judge(here.get(task)), _judge(there.get(task)), path)
        for task in dict.fromkeys([*here, *there])
        if here.get(task) != there.get(task)
    ]


def _shown(routes: Mapping[str, int] | None) -> str:
    return "null" if routes is None else f"{{{', '.join(f'{task}: {pair}' for task, pair in routes.items())}}}"


def _judge(pair: int | None) -> str:
    return "absent" if pair is None else f"{pair} ({' and '.join(teacher_pair(pair))})"


def cached_model_problems(role: str, spec: ModelSpec | None, held: Mapping[str, Any], path: str) -> list[str]:
    """Return how the config's model differs from the cached one, one sentence each."""
    return [differs(key, here, there, path) for key, here, there in model_differences(role, spec, held)]


def model_differences(role: str, spec: ModelSpec | None, held: Mapping[str, Any]) -> list[tuple[str, object, object]]:
    """Return (config key, value here, value there) for each difference of the config's model from one run elsewhere.

    Args:
        role: of both.
        spec: the config's; if its files are not on this machine, the paths are compared.
        held: ``model_identity`` of the other.
    """
    if spec is None or not spec.path or held.get("elsewhere"):
        return []
    given = model_identity(spec)
    found: list[tuple[str, object, object]] = [
        (f"model.{role}.{key}", given[key], held.get(key))
        for key in ("dtype", "quantization")
        if given[key] != held.get(key)
    ]
    adapter, held_adapter = given.get("adapter") or {}, held.get("adapter") or {}
    compared = "sha256" if adapter.get("sha256") and held_adapter.get("sha256") else "path"
    if adapter.get(compared) != held_adapter.get(compared):
        found.append((f"model.{role}.adapter", adapter.get("path"), held_adapter.get("path")))
    known = next((key for key in ("commit", "sha256") if given[key] and held[key]), None)
    if known is None and given["path"] != held["path"]:
        found.append((f"model.{role}.path", given["path"], f"{held['path']} (that model is not here to compare)"))
    elif known is not None and given[known] != held[known]:
        here, there = (f"{side['path']} ({known} {side[known][:12]})" for side in (given, held))
        found.append((f"model.{role}", here, there))
    return found


def differs(key: str, here: object, there: object, path: object) -> str:
    """Return a sentence with the config's value, the cache's value, and the remedy."""
    return (
        f"{key} is {here}, but the cache reference.path={path} was made with {there}; give the same, or make another "
        "cache in another directory"
    )


def data_problems(content: Mapping[str, Any], given: Mapping[str, Any], path: object) -> list[str]:
    """Return differences in tokenizer, template and data, one sentence each.

    Sets with the cached fingerprints hold the same tokens, whatever the files are called.

    Args:
        content: of the cache.
        given: this run's ``data_identity``.
        path: the cache's path.
    """
    same_sets = {name: given["sets"][name] in (None, content["sets"][name]) for name in ("train", "val")}
    other_here, other_there = given.get("other") or {}, content.get("other") or {}
    same_tokenizers = given["tokenizer"] == content["tokenizer"]
    same_tokenizers &= other_here.get("tokenizer") == other_there.get("tokenizer")
    if all(same_sets.values()) and same_tokenizers:
        return []
    found = []
    for key, own, other in (
        ("tokenizer", "the student's tokenizer", "the teachers' tokenizer"),
        ("template", "data.template", "data.teacher_template"),
    ):
        if given[key] != content[key]:
            found.append(differs(own, f"another one ({given[key][:12]})", content[key][:12], path))
        if other_here.get(key) != other_there.get(key):
            here, there = (str(side.get(key, "the student's"))[:13] for side in (other_here, other_there))
            found.append(differs(other, here, there, path))
    if given.get("processor") != content.get("processor"):
        here, there = (str(side.get("processor", "of no images"))[:12] for side in (given, content))
        found.append(differs("the student's image processor", f"another one ({here})", there, path))
    here, there = given["data"], content["data"]
    ignored = {"template"} | ({"val", "val_subset"} if same_sets["val"] and not here.get("val_size") else set())
    found += [
        differs(f"data.{key}", here.get(key), there.get(key), path)
        for key in [*here, *(key for key in there if key not in here)]
        if key not in ignored and here.get(key) != there.get(key)
    ]
    return found


def missing_rows(index: RowIndex, sets: LoadedSets) -> dict[str, NDArray[np.int64]]:
    """Return set -> positions of the rows that the cache lacks; rows without a valid token are never needed."""
    return {name: rows_lacking(index, encoded) for name, encoded in named_sets(sets).items()}


def rows_lacking(index: RowIndex, encoded: EncodedSet) -> NDArray[np.int64]:
    """Return [m], positions of a set's rows that have a valid token and are not in the cache."""
    return np.flatnonzero((index.find(keys_of_set(encoded)) < 0) & (encoded.valid_tokens > 0))


def named_sets(sets: LoadedSets) -> dict[str, EncodedSet]:
    """Return ``train`` and, if there is one, ``val``."""
    return {"train": sets.train} | ({} if sets.val is None else {"val": sets.val})


def missing_problem(
    index: RowIndex, missing: Mapping[str, NDArray[np.int64]], sets: LoadedSets, path: object
) -> list[str]:
    """Return one sentence that counts the missing rows and lists the first ones; empty if none are missing.

    Routed rows that the cache has for another pair of teachers are named with their tasks, in a sentence of their own.
    """
    moved, shown = [], []
    for name, encoded in named_sets(sets).items():
        judged = _other_pairs(index, encoded, missing[name])
        moved += [_judged_otherwise(name, encoded, judged)] if judged else []
        rows = np.array([row for row in missing[name].tolist() if row not in judged], np.int64)
        if len(rows):
            shown.append(f"{len(rows)} of {len(encoded)} rows of data.{name} (rows {listed(encoded.row_ids[rows])})")
    remedy = "the same overrides with deltakd.cache in place of deltakd.train add them"
    found = [f"the cache reference.path={path} lacks {' and '.join(shown)}; {remedy}"] if shown else []
    if moved:
        found.append(
            f"rows have other tasks than when the cache reference.path={path} was made: {'; '.join(moved)}; put their "
            f"tasks back, or {remedy}"
        )
    return found


def _other_pairs(index: RowIndex, encoded: EncodedSet, rows: NDArray[np.int64]) -> dict[int, int]:
    """Return position -> number of the pair that judged the row there, of rows that the cache has for another pair."""
    tasks = encoded.tasks
    if tasks is None or not tasks.routed or not len(rows):
        return {}
    found: dict[int, int] = {}
    for pair in sorted({route for route in tasks.routes if route is not None}):
        judged = replace(encoded, tasks=replace(tasks, routes=(pair,) * len(tasks.names)))
        there = index.find(keys_of_rows(judged, rows.tolist())) >= 0
        found |= dict.fromkeys(rows[there].tolist(), pair)
    return found


def _judged_otherwise(name: str, encoded: EncodedSet, judged: Mapping[int, int]) -> str:
    tasks = encoded.tasks
    assert tasks is not None
    each = [
        f"{encoded.row_ids[row]} ({tasks.names[tasks.numbers[row]] or 'no task'}: judged by pair {tasks.route(row)} "
        f"here, by pair {pair} there)"
        for row, pair in judged.items()
    ]
    return f"{len(each)} of data.{name}, rows {listed(each)}"
