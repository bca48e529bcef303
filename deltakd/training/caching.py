"""A run that fills a cache of references."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltakd.data import LoadedSets
from deltakd.data.routing import routed
from deltakd.distributed.devices import choose_device
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models.roles import Vocabularies, open_tokenizer
from deltakd.references import CacheStore, LiveReferences
from deltakd.references.begin import Caching, begin_store
from deltakd.references.content import data_identity, data_problems, missing_rows
from deltakd.references.fill import drop_damaged, make_missing, summary_of
from deltakd.references.from_server import ServedTeachers, ServerAddress
from deltakd.references.index import RowIndex
from deltakd.references.log_prob_files import LogProbFiles
from deltakd.references.outside import LogProbSource, outside_problems
from deltakd.tracking.environment import costs_since, environment
from deltakd.training.assembly import check_tokens, open_references, open_role, read_vocabularies
from deltakd.training.elsewhere import open_cache
from deltakd.training.image_check import check_images
from deltakd.training.settings import RunSettings
from deltakd.types import STUDENT

log = logging.getLogger(__name__)


def fill_cache(settings: RunSettings) -> dict[str, Any]:
    """Run the references of a loss over its training and validation rows, and store their output.

    Writes to ``reference.path``: ``manifest.json``, shards, the output embeddings (``hidden``) and finally
    ``summary.json``. Rows already stored are not run again, so an interrupted cache continues, and one made with
    ``data.limit`` can grow.

    Args:
        settings: from ``make_caching_settings``.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigError: the existing cache was made from other data; names every difference.
        StoreError: a damaged cache, or a full disk.
        ValueError: data or models that can't be used, or no K that meets ``reference.target_error``.
    """
    started = time.perf_counter()
    caching, store = _load(settings)
    speed = make_missing(caching, store)
    costs = costs_since(started, speed)
    summary = summary_of(store) | {"meta": environment() | costs}
    RunDirectory(store.path).write_summary(summary)
    return summary


def finished_cache(settings: RunSettings) -> dict[str, Any] | None:
    """Return the summary of a cache that has all rows of a run; None if rows are missing.

    Needs no model: the cache is read as a training run reads it.
    """
    if settings.cache is None:
        return None
    path = Path(str(settings.cache.path))
    settings.data.make_files()
    tokenizer = open_tokenizer(settings.model, path / "tokenizer")
    teachers = read_vocabularies(settings, tokenizer).other
    sets = _routed(settings, settings.data.load(tokenizer, teachers=teachers))
    store = open_cache(settings, tokenizer, sets, teachers)
    if any(len(rows) for rows in missing_rows(RowIndex(store), sets).values()):
        return None
    directory = RunDirectory(path)
    if not directory.finished:
        directory.write_summary(summary_of(store) | {"meta": environment()})
    return directory.read_summary()


def _load(settings: RunSettings) -> tuple[Caching, CacheStore]:
    """Load data and models, and open the cache or create it."""
    assert settings.cache is not None
    path = Path(str(settings.cache.path))
    settings.data.make_files()
    tokenizer = open_tokenizer(settings.model, path / "tokenizer")
    vocabularies = read_vocabularies(settings, tokenizer)
    sets = settings.data.load(tokenizer, teachers=vocabularies.other)
    check_images(settings, sets)
    sets = _routed(settings, sets)
    check_tokens(sets, tokenizer, vocabularies)
    given = data_identity(settings.data, tokenizer, sets, vocabularies.other)
    store = None
    if CacheStore.is_at(path):
        store = CacheStore.open(path)
        problems = data_problems(store.manifest.content, given, path)
        if problems:
            raise ConfigError(problems)
        if settings.cache.remake:
            drop_damaged(store)
        else:
            store.check(checksum=settings.cache.verify)
    device = choose_device(settings.trainer.accelerator)
    outside = _outside(settings, tokenizer, vocabularies, sets)
    if outside is not None and store is not None:
        problems = outside_problems(store.manifest.content, outside, path)
        if problems:
            raise ConfigError(problems)
    references = LiveReferences(open_references(settings, tokenizer, vocabularies))
    references.to(device)
    caching = Caching(
        settings.cache,
        settings.model,
        settings.data,
        settings.loss,
        tokenizer,
        vocabularies,
        sets,
        references,
        settings.model.routes or None,
        outside,
        device,
        open_student=partial(open_role, settings, STUDENT, tokenizer, vocabularies),
        show_progress=settings.trainer.enable_progress_bar,
    )
    return caching, begin_store(caching, given) if store is None else store


def _routed(settings: RunSettings, sets: LoadedSets) -> LoadedSets:
    """Return the sets with the pairs of teachers that judge their rows, if the config routes them."""
    return routed(sets, settings.model.routes) if settings.model.routes else sets


def _outside(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, vocabularies: Vocabularies, sets: LoadedSets
) -> LogProbSource | None:
    """Return the servers or files that give log-probs of models that are not loaded; None: there are none."""
    cache = settings.cache
    assert cache is not None
    if cache.log_probs is not None:
        return LogProbFiles(cache.log_probs, settings.data, tokenizer, vocabularies.size, sets, cache.k)
    if cache.url is None:
        return None
    assert cache.k is not None, "checked with the config"
    teacher = ServerAddress("reference.url", cache.url, "reference.served_model", cache.served_model)
    raw = None
    if cache.raw_url is not None:
        raw = ServerAddress("reference.raw_url", cache.raw_url, "reference.served_raw_model", cache.served_raw_model)
    k = min(cache.k, vocabularies.size)
    return ServedTeachers(teacher, raw, tokenizer, vocabularies.size, settings.data.max_length, k)
