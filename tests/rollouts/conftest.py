"""Fixtures of whole runs on the student's own responses."""

from __future__ import annotations

import pytest

from tests.tiny import World, save_model


@pytest.fixture(scope="session")
def sharp(world: World) -> list[str]:
    """References that are far from uniform, so that there is something to learn."""
    for role, seed, spread in (("teacher", 3, 0.4), ("teacher_raw", 2, 0.2)):
        save_model(world.root / "on_policy" / role, seed=seed, width=24, initializer_range=spread)
    return [f"model.{role}.path={world.root / 'on_policy' / role}" for role in ("teacher", "teacher_raw")]
