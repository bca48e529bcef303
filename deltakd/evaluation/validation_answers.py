"""Answers of each validation during training: ``validation/step_<step>.jsonl`` in the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltakd.io.files import read_by_step, write_json_lines

_FOLDER = "validation"


def write_validation_answers(run_dir: Path, step: int, records: Sequence[dict[str, Any]]) -> None:
    """Write the answers after an optimiser step; a resumed run writes the same file again."""
    write_json_lines(run_dir / _FOLDER / f"step_{step:08d}.jsonl", records, "answers")


def read_validation_answers(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """Return optimiser step -> records of ``evaluate_set``, in the order of the steps.

    Raises:
        ValueError: a file is damaged.
    """
    return read_by_step(run_dir / _FOLDER)
