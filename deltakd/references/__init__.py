"""References: the frozen companions of the student, as sources of heads."""

from deltakd.references.base import References
from deltakd.references.cached import CachedReferences, CacheSettings
from deltakd.references.live import LiveReferences, live_problems
from deltakd.references.store import CacheStore, StoreError

__all__ = [
    "CacheSettings",
    "CacheStore",
    "CachedReferences",
    "LiveReferences",
    "References",
    "StoreError",
    "live_problems",
]
