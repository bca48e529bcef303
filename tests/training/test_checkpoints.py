"""Which step's student is kept: the best objective, and of equal ones the lower cross-entropy."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deltakd.io.run_directory import RunDirectory
from deltakd.training.callbacks import Checkpoints
from tests.tiny import make_rows, write_rows

Train = Callable[..., RunDirectory]


def keep(directory: Path, mode: str, metrics: list[dict[str, float]], stop: int = 0) -> int | None:
    """The step that is kept of validations at steps 1, 2, ...; resumed after step ``stop``."""
    validation: Any = SimpleNamespace(last_metrics={})

    def made() -> Checkpoints:
        checkpoints = Checkpoints(directory, validation, "val/score", mode, step_size=1)
        checkpoints._save_student = lambda trainer: None  # type: ignore[method-assign]
        return checkpoints

    checkpoints = made()
    for step, found in enumerate(metrics, start=1):
        validation.last_metrics = found
        checkpoints._keep_best(cast(Any, SimpleNamespace(global_step=step)))
        if step == stop:
            state = checkpoints.state_dict()
            checkpoints = made()
            checkpoints.load_state_dict(state)
    return checkpoints.best_step


NAN = float("nan")


@pytest.mark.parametrize(
    ("mode", "scores", "ces", "best"),
    [
        ("max", [0, 0, 0, 0], [3.0, 2.0, 2.5, 2.0], 2),
        ("max", [0, 5, 5, 1], [3.0, 2.0, 1.0, 0.5], 3),
        ("max", [5, 0, 5], [1.0, 0.1, 2.0], 1),
        ("min", [1, 0, 0], [1.0, 3.0, 2.0], 3),
        ("max", [NAN, 0, 0], [1.0, NAN, 2.0], 2),
    ],
)
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_ties_go_to_the_lower_cross_entropy_resumed_or_not(
    tmp_path: Path, mode: str, scores: list[float], ces: list[float], best: int, stop: int
) -> None:
    metrics = [{"val/score": float(s), "val/ce": ce, "val/loss": -ce} for s, ce in zip(scores, ces, strict=True)]
    assert keep(tmp_path, mode, metrics, stop) == best


def test_without_a_part_ce_ties_go_to_the_lower_loss(tmp_path: Path) -> None:
    assert keep(tmp_path, "max", [{"val/score": 0.0, "val/loss": loss} for loss in (3.0, 1.0, 2.0)]) == 2


def test_a_run_whose_scores_tie_exports_the_student_of_the_lowest_cross_entropy(train: Train, tmp_path: Path) -> None:
    # One token can't match words that no text of the world has.
    rows = [row | {"response": f"{row['response']} Ж"} for row in make_rows(6, 2)]
    run = train(
        "sft",
        "evaluation=default",
        f"data.val={write_rows(tmp_path / 'val.jsonl', cast(Any, rows))}",
        "evaluation.decoding.max_new_tokens=1",
        "objective=val/exact_match",
        "trainer.val_every_n_steps=1",
        "evaluation.val_limit=2",
    )
    with (run.path / "metrics.csv").open(newline="") as file:
        seen = [row for row in csv.DictReader(file) if row.get("val/exact_match")]
    assert {float(row["val/exact_match"]) for row in seen} == {0.0}
    lowest = min(seen, key=lambda row: float(row["val/ce"]))
    summary = run.read_summary()
    assert summary["meta"]["best_step"] == int(lowest["step"]) > 1
    assert summary["val/ce"] == pytest.approx(float(lowest["val/ce"]))
