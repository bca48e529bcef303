"""Servers of references in a thread of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from deltakd.config.build import make_serving_settings
from deltakd.config.compose import compose_config
from deltakd.references.serving import team
from deltakd.references.serving.reference_server import ReferenceServer
from deltakd.training.serving import make_server

TOKEN = "a token of the tests alone"


class Killed(BaseException):
    """Ends a server in the middle of a batch, as Ctrl-C does."""


def at(path: Path, *extra: str) -> list[str]:
    """Overrides of a run that asks the server at a socket in ``path``."""
    return ["reference=served", f"reference.url=unix://{path}/socket", "reference.wait_s=0", *extra]


@contextmanager
def serving(overrides: Sequence[str]) -> Iterator[ReferenceServer]:
    """Run a server while the context lasts."""
    server = make_server(make_serving_settings(compose_config("train", list(overrides))))

    def run() -> None:
        with suppress(Killed):
            server.run()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def die_after(requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a server die at the request after some others."""
    seen = 0
    real = team.batch_of

    def counted(*args: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > requests:
            raise Killed
        return real(*args)

    monkeypatch.setattr(team, "batch_of", counted)
