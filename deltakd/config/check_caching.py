"""Checks of a run that fills a cache of references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltakd.data.sources.records import missing_sources
from deltakd.io.inference_server import url_problems
from deltakd.models import ModelSettings
from deltakd.references import CacheSettings, CacheStore
from deltakd.references.content import cache_problems
from deltakd.references.topk import topk_problems
from deltakd.types import TEACHER_RAW, Loss


def caching_problems(cache: Any, models: ModelSettings, loss: Loss | None) -> list[str]:
    """Return why a cache can't be created; an existing cache must have the same content."""
    if not isinstance(cache, CacheSettings):
        return ["reference is not a cache; add reference=cached reference.path=DIR"]
    if loss is None:
        return []
    if not loss.requires:
        return ["the loss reads no references, so there is nothing to cache; give the loss that will be trained"]
    existing = (
        cache_problems(models, loss, cache, adding=True) if cache.path and CacheStore.is_at(Path(cache.path)) else []
    )
    if cache.outside or cache.raw_url is not None:
        return outside_problems(cache, loss) + existing
    return existing or (topk_problems(loss) if cache.store == "topk" else [])


def outside_problems(cache: CacheSettings, loss: Loss) -> list[str]:
    """Return why log-probs from servers or files can't be cached for a loss."""
    key = "reference.url" if cache.log_probs is None else "reference.log_probs"
    found = topk_problems(loss)
    if cache.log_probs is None:
        found += url_problems(cache.url, "reference.url")
        found += [] if cache.raw_url is None else url_problems(cache.raw_url, "reference.raw_url")
    else:
        found += missing_sources({key: cache.log_probs})
        if cache.url is not None or cache.raw_url is not None:
            found.append("reference.log_probs and reference.url both give the teacher's log-probs; give one of them")
    if TEACHER_RAW in loss.requires - cache.outside:
        found.append(
            f"the loss reads teacher_raw, and {key} gives the teacher alone: without a raw partner it gives kd, not "
            "delta; give loss=kd, "
            + ("reference.raw_url=..., " if cache.log_probs is None else "")
            + "or load the models"
        )
    unread = sorted(cache.outside - loss.requires)
    if unread:
        found.append(f"the loss does not read {', '.join(unread)}, which {key} would be asked for; remove the address")
    if cache.store != "topk" or (cache.k is None and cache.log_probs is None):
        found.append(
            f"{key} gives log-probs of a few tokens; give reference.store=topk"
            + (
                " reference.k=20 (the most that vLLM answers unless it is started with --max-logprobs)"
                if cache.log_probs is None
                else ""
            )
        )
    if loss.temperature != 1:
        found.append(
            f"loss.temperature is {loss.temperature:g}, and log-probs of {key} are those at temperature 1; give "
            "loss.temperature=1"
        )
    return found
