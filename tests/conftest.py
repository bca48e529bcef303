"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.run_directory import RunDirectory
from deltakd.training.run import run_training
from tests.tiny import World, make_world


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder ``shared`` beside the repository: data sets and real tokenizers that are not part of it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no folder `shared` beside the repository: it holds the data sets and tokenizers this test reads")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Tiny models and rows, made once; tests write elsewhere."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def train(world: World, tmp_path: Path) -> Callable[..., RunDirectory]:
    """Train in this process: ``train(loss, *overrides, name=...)``."""

    def run(loss: str = "delta_kd", *overrides: str, name: str = "run", drop: tuple[str, ...] = ()) -> RunDirectory:
        directory = tmp_path / name
        chosen = [o for o in world.overrides(directory, loss, *overrides) if not o.startswith(drop or ("\0",))]
        run_training(make_settings(compose_config("train", chosen)), directory)
        return RunDirectory(directory)

    return run
