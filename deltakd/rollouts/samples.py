"""Some of the student's responses as text: ``rollouts/step_<step>.jsonl`` in the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltakd.io.files import read_by_step, write_json_lines
from deltakd.rollouts.responses import Response

_FOLDER = "rollouts"


def sample_record(
    row_id: int, prompt: Sequence[int], response: Response, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return a response as a record: ``row_id, prompt, output`` (texts)``, output_tokens, finished``."""
    return {
        "row_id": row_id,
        "prompt": tokenizer.decode(list(prompt)),
        "output": tokenizer.decode(response.tokens, skip_special_tokens=True),
        "output_tokens": len(response.tokens),
        "finished": response.finished,
    }


def write_samples(run_dir: Path, step: int, records: Sequence[dict[str, Any]]) -> Path:
    """Write the responses sampled for an optimiser step (from 1); a resumed run writes the same file again."""
    path = run_dir / _FOLDER / f"step_{step:08d}.jsonl"
    write_json_lines(path, records, "responses")
    return path


def read_samples(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """Return optimiser step -> records, in the order of the steps.

    Raises:
        ValueError: a file is damaged.
    """
    return read_by_step(run_dir / _FOLDER)
