"""Teachers by task on several processes: each rank has rows of some pairs only, and the numbers are those of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltakd.cache import make_cache
from tests.distributed.test_scale import assert_same_run, chosen, run, summary
from tests.tiny import World, make_rows, save_model, write_rows


@pytest.fixture(scope="module")
def routed(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of rows of which few are the second pair's, so that most micro-batches have none."""
    root = tmp_path_factory.mktemp("routed_ranks")
    for seed, role in enumerate(("teacher_2", "teacher_raw_2"), 7):
        save_model(root / role, seed=seed, width=16, initializer_range=0.3)
    for name, count in (("train", 40), ("val", 7)):
        rows = [row | {"task": "seldom" if n % 7 == 3 else "often"} for n, row in enumerate(make_rows(count, count))]
        write_rows(root / f"{name}.jsonl", rows)
    return [
        "model.routes={often: 1, seldom: 2}",
        *(f"+model.{role}.path={root / role}" for role in ("teacher_2", "teacher_raw_2")),
        *(f"data.{name}={root / name}.jsonl" for name in ("train", "val")),
        "trainer.max_steps=4",
        "evaluation.measures.rows=7",
        f"reference.path={root / 'cache'}",
    ]


@pytest.fixture(scope="module")
def alone(routed: list[str], world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    live = [option for option in routed if not option.startswith("reference.")]
    return run(world, tmp_path_factory.mktemp("alone") / "run", "delta_kd", 1, *live)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("fsdp", ("reference.sharding=shard",)),
        ("ddp", ("data.packing=true",)),
        ("ddp", ("reference=cached",)),
        ("fsdp", ("reference=cached", "data.packing=true")),
    ],
)
def test_two_processes_of_routed_rows_are_one(
    strategy: str, options: tuple[str, ...], routed: list[str], alone: Path, world: World, tmp_path: Path
) -> None:
    overrides = [*routed, *options]
    if "reference=cached" in options:
        student = f"model.student.path={world.root / 'plain'}"
        make_cache(world.overrides(tmp_path / "unused", "delta_kd", *overrides, student))
    else:
        overrides.remove(next(option for option in overrides if option.startswith("reference.path=")))
    two = run(world, tmp_path / "two", "delta_kd", 2, *overrides, *chosen(strategy))
    assert_same_run(two, alone)
    mine, expected = summary(two), summary(alone)
    measured = [name for name in expected if name.startswith(("val/often/kl", "val/seldom/kl", "val/kl"))]
    if "reference.sharding=shard" not in options:
        # Sharded references are measured by deltakd.evaluate.
        assert {name: mine[name] for name in measured} == pytest.approx({n: expected[n] for n in measured}, rel=1e-4)
        assert "val/seldom/kl_teacher" in measured
