"""References: the frozen models that the student learns from, as sources of heads."""

from deltakd.references.base import References, RoutedHeads
from deltakd.references.cached import CachedReferences
from deltakd.references.live import LiveReferences
from deltakd.references.routed import RoutedReferences
from deltakd.references.serving.remote import ServedReferences
from deltakd.references.settings import (
    CacheSettings,
    LiveSettings,
    ReferenceSettings,
    ServedSettings,
    SourceSettings,
)
from deltakd.references.store import CacheStore, StoreError

__all__ = [
    "CacheSettings",
    "CacheStore",
    "CachedReferences",
    "LiveReferences",
    "LiveSettings",
    "ReferenceSettings",
    "References",
    "RoutedHeads",
    "RoutedReferences",
    "ServedReferences",
    "ServedSettings",
    "SourceSettings",
    "StoreError",
]
