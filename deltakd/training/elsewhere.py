"""References that a run does not load: they were run before, into a cache, or a server runs them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltakd.data import LoadedSets, tokenizer_fingerprint
from deltakd.distributed.devices import choose_device
from deltakd.distributed.ranks import is_main_process
from deltakd.io.errors import ConfigError
from deltakd.models.identity import spec_of
from deltakd.models.roles import open_vocabularies
from deltakd.references import CachedReferences, CacheStore, ServedReferences
from deltakd.references.content import (
    data_identity,
    data_problems,
    missing_problem,
    missing_rows,
    model_differences,
)
from deltakd.references.serving.connection import ServerConnection
from deltakd.references.serving.secret import read_token
from deltakd.training.image_check import server_problems
from deltakd.training.settings import RunSettings
from deltakd.types import STUDENT

log = logging.getLogger(__name__)


def open_elsewhere(
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    sets: LoadedSets,
    teachers: PreTrainedTokenizerBase | None,
) -> CachedReferences | ServedReferences | None:
    """Open a run's cache, or reach its server; None: it loads its references itself, or reads none.

    Args:
        settings: of the run.
        tokenizer: the student's.
        sets: tokenised rows, all of which a cache must have.
        teachers: the teachers' tokenizer, if they have one of their own.

    Raises:
        ConfigError: the references elsewhere are not those of the config; names every difference.
        StoreError: a file of the cache is not as it was written.
        ServerError: the server is not there within ``reference.wait_s``, or refuses.
        ValueError: there is no token for the server.
    """
    if settings.cache is not None:
        return _cached(settings, tokenizer, sets, teachers)
    return None if settings.served is None else _served(settings, tokenizer, sets)


def open_cache(
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    sets: LoadedSets,
    teachers: PreTrainedTokenizerBase | None,
) -> CacheStore:
    """Open a run's cache, and check that it was made from this data; rows may be missing.

    Raises:
        ConfigError: names every difference.
        StoreError: a file is not as it was written.
    """
    assert settings.cache is not None
    assert settings.cache.path is not None
    store = CacheStore.open(Path(settings.cache.path))
    given = data_identity(settings.data, tokenizer, sets, teachers)
    problems = data_problems(store.manifest.content, given, store.path)
    if problems:
        raise ConfigError(problems)
    # Checksums read the whole cache, so one process does it; sizes are cheap.
    store.check(checksum=settings.cache.verify and is_main_process())
    return store


def _cached(
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    sets: LoadedSets,
    teachers: PreTrainedTokenizerBase | None,
) -> CachedReferences:
    store = open_cache(settings, tokenizer, sets, teachers)
    references = CachedReferences(store, settings.loss.requires)
    index = references.index
    missing = missing_problem(index, missing_rows(index, sets), sets, store.path)
    if missing:
        raise ConfigError(missing)
    return references


def student_vocabulary(settings: RunSettings, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return V of the student alone."""
    return open_vocabularies(settings.model, {STUDENT: settings.model.specs[STUDENT]}, tokenizer).size


def _served(settings: RunSettings, tokenizer: PreTrainedTokenizerBase, sets: LoadedSets) -> ServedReferences:
    """Reach the server of a run's references, and check that it holds what the config names.

    Raises:
        ConfigError: names every difference.
        ServerError: it is not there within ``reference.wait_s``, or refuses.
        ValueError: there is no token.
    """
    assert settings.served is not None
    given = settings.served
    token = read_token(create=False)
    device = choose_device(settings.trainer.accelerator, settings.trainer.devices)
    connection = ServerConnection(given.address, token, settings.read_roles, given.wait_s, given.transport, device)
    problems = _server_problems(settings, tokenizer, connection.content)
    reader = sets.image_reader
    if reader is not None:
        problems += server_problems(reader, connection.content, given.url)
    if problems:
        connection.close()
        raise ConfigError(problems)
    pairs = (settings.model.routes or {}).values()
    references = ServedReferences(connection, given.ahead, settings.loss.requires, pairs)
    chosen = connection.chosen
    by = chosen.name.replace("_", " ") + (f" ({chosen.reason})" if chosen.reason else "")
    log.info("The server %s runs %s; hidden states come by %s.", given.url, ", ".join(settings.read_roles), by)
    return references


def _server_problems(settings: RunSettings, tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> list[str]:
    """Return how the server's models, tokenizer and rows differ from this run's, one sentence each."""
    vocabulary = student_vocabulary(settings, tokenizer)
    pairs: list[tuple[str, object, object]] = [
        ("the student's tokenizer", tokenizer_fingerprint(tokenizer)[:12], str(content.get("tokenizer"))[:12]),
        ("the student's number of tokens", vocabulary, content.get("student_vocabulary")),
        ("data.packing", settings.data.packing, content.get("packing")),
    ]
    found = [(key, here, there) for key, here, there in pairs if here != there]
    for role in settings.read_roles:
        found += model_differences(role, spec_of(settings.model, role), content["models"][role])
    url = settings.served.url if settings.served is not None else ""
    problems = [
        f"{key} is {here}, but the server reference.url={url} was started with {there}; start it with the overrides "
        "of this run"
        for key, here, there in found
    ]
    positions = content.get("positions")
    if positions is not None and settings.data.max_length > positions:
        problems.append(
            f"data.max_length is {settings.data.max_length}, but the server's models have positions for {positions} "
            f"tokens only; give data.max_length={positions} or less, or other models"
        )
    return problems
