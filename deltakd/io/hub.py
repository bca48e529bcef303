"""A quick test of whether the Hugging Face hub is reachable."""

from __future__ import annotations

import os
import socket
import urllib.request
from functools import lru_cache
from urllib.parse import urlparse

#: Seconds to wait for the hub to accept a connection.
REACH_SECONDS = 3.0


@lru_cache(maxsize=1)
def hub_reachable() -> bool:
    """Return True if the hub is reachable; tried once per process.

    Offline, the hub's client would retry every file for half a minute, even if all are in the local cache. Behind a
    proxy the result is always True: only the client knows how to use it.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    url = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if url.scheme in urllib.request.getproxies():
        return True
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False
