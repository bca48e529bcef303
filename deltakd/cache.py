"""A cache of references: ``python -m deltakd.cache experiment=delta_kd_gpt2 reference.path=DIR [key=value ...]``."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from deltakd.config.build import make_caching_settings, make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError, guarded
from deltakd.io.run_directory import RunDirectory
from deltakd.references import CacheStore, LiveReferences
from deltakd.references.begin import Caching, begin_store
from deltakd.references.build import drop_damaged, in_units, make_missing, summary_of
from deltakd.references.content import data_identity, data_problems, missing_rows
from deltakd.references.index import RowIndex
from deltakd.tracking.environment import environment, peak_memory_mib
from deltakd.training.assembly import make_model, make_tokenizer, open_cache, shared_vocabulary
from deltakd.training.settings import RunSettings
from deltakd.types import STUDENT

log = logging.getLogger(__name__)

USAGE = """Run the references once, so that trainings read them from disk.

  python -m deltakd.cache experiment=delta_kd_gpt2 reference=cached reference.path=DIR [key=value ...]

Overrides are those of deltakd.train; the same ones, given to deltakd.train, then train from the cache. What is stored:
  reference.store=hidden   last hidden states: exact, for every loss, delta_weight and temperature (the default)
  reference.store=topk     log-probs of K tokens and the rest: small, approximate, for one temperature
                           [reference.k=64, or reference.target_error=0.01, by which K is chosen]
  reference.remake=true    make damaged files again
Started again with the same reference.path it goes on where it stopped.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and make the cache."""
    parser = argparse.ArgumentParser("deltakd.cache", description=USAGE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for deltakd.train")
    overrides = parser.parse_args(argv).overrides
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    guarded(lambda: make_cache(overrides), "the same command")


def make_cache(overrides: Sequence[str]) -> dict[str, Any]:
    """Make or complete the cache that ``reference.path`` names, and log what it holds; see ``run_caching``.

    Args:
        overrides: Hydra overrides; without ``reference=...`` it is ``cached``.
    """
    given = any(override.startswith("reference=") for override in overrides)
    cfg = compose_config("train", overrides if given else ["reference=cached", *overrides])
    summary = run_caching(cfg)
    log.info(
        "%s: %d rows, %d tokens, %s (%d bytes per token). A training reads it with reference=cached reference.path=%s.",
        cfg.reference.path,
        summary["rows"],
        summary["tokens"],
        in_units(summary["bytes"]),
        summary["bytes_per_token"],
        cfg.reference.path,
    )
    return summary


def run_caching(cfg: DictConfig) -> dict[str, Any]:
    """Run the references of the config's loss over its training and validation rows, and store what they give.

    The directory ``reference.path`` gets ``manifest.json``, shards, the output embeddings (``hidden``) and, last,
    ``summary.json``. Rows that are there already are not run again: an interrupted cache goes on, one that was made
    with ``data.limit`` grows, and a finished one is only read, for which no model needs to be there.

    Args:
        cfg: composed config (``conf/train.yaml``) with ``reference=cached``.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigError: everything that is wrong with the config, or what differs from the cache that is there.
        StoreError: a damaged cache, or a disk that is full.
        ValueError: data or models that can't be used, or no K that meets ``reference.target_error``.
    """
    path = OmegaConf.select(cfg, "reference.path")
    if path and CacheStore.is_at(Path(path)) and not OmegaConf.select(cfg, "reference.remake"):
        summary = _finished(cfg)
        if summary is not None:
            log.info("%s is finished already; nothing to do.", path)
            return summary
    settings = make_caching_settings(cfg)
    started = time.perf_counter()
    caching, store = _load(settings)
    speed = make_missing(caching, store)
    costs = {
        "seconds": round(time.perf_counter() - started, 3),
        "tokens_per_second": speed,
        "peak_memory_mib": round(peak_memory_mib(), 1),
    }
    summary = summary_of(store) | {"meta": environment() | costs}
    RunDirectory(store.path).write_summary(summary)
    return summary


def _finished(cfg: DictConfig) -> dict[str, Any] | None:
    """The summary of a cache that has all rows of this config; None where rows are missing.

    It is read as a training would read it.
    """
    settings = make_settings(cfg)
    if settings.cache is None:
        return None
    path = Path(str(settings.cache.path))
    if settings.data.prepare is not None:
        settings.data.prepare()
    tokenizer = make_tokenizer(settings, path / "tokenizer")
    sets = settings.data.load(tokenizer)
    store = open_cache(settings, tokenizer, sets)
    if any(len(rows) for rows in missing_rows(RowIndex(store), sets).values()):
        return None
    directory = RunDirectory(path)
    if not directory.finished:
        directory.write_summary(summary_of(store) | {"meta": environment()})
    return directory.read_summary()


def _load(settings: RunSettings) -> tuple[Caching, CacheStore]:
    """Data and models; the cache that is there, or a new one."""
    assert settings.cache is not None
    path = Path(str(settings.cache.path))
    if settings.data.prepare is not None:
        settings.data.prepare()
    tokenizer = make_tokenizer(settings, path / "tokenizer")
    vocabulary = shared_vocabulary(settings, tokenizer)
    sets = settings.data.load(tokenizer)
    given = data_identity(settings.data, tokenizer, sets)
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
    models = {role: make_model(settings, role, tokenizer, vocabulary) for role in settings.specs if role != STUDENT}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    references = LiveReferences(models)
    references.to(device)
    caching = Caching(
        settings.cache,
        settings.model,
        settings.data,
        settings.loss,
        tokenizer,
        vocabulary,
        sets,
        references,
        device,
        open_student=partial(make_model, settings, STUDENT, tokenizer, vocabulary),
        show_progress=settings.trainer.enable_progress_bar,
    )
    return caching, begin_store(caching, given) if store is None else store


if __name__ == "__main__":
    main()
