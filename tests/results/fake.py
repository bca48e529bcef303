"""Run directories as training runs leave them, written by hand, so that reports can be tested without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

LOSSES: dict[str, dict[str, Any]] = {
    "sft": {"_target_": "deltakd.losses.SupervisedFineTuning"},
    "kd": {
        "_target_": "deltakd.losses.Distillation",
        "target": {"_target_": "deltakd.losses.teacher_target"},
        "divergence": {"_target_": "deltakd.losses.ForwardKL"},
        "temperature": 1.0,
        "ce_weight": 0.5,
    },
    "delta_kd": {
        "_target_": "deltakd.losses.Distillation",
        "target": {"_target_": "deltakd.losses.delta_target", "delta_weight": 1.0},
        "divergence": {"_target_": "deltakd.losses.ForwardKL"},
        "temperature": 1.0,
        "ce_weight": 0.5,
    },
    "delta_bilinear": {
        "_target_": "deltakd.losses.Distillation",
        "target": {"_target_": "deltakd.losses.bilinear_target", "delta_weight": 1.0, "v": 1.0},
        "divergence": {"_target_": "deltakd.losses.ForwardKL"},
        "temperature": 1.0,
        "ce_weight": 0.5,
    },
}

Config = dict[str, Any]


def config_of(loss: str, seed: int, weight: float = 1.0) -> Config:
    """A config with the keys that matter here."""
    settings = json.loads(json.dumps(LOSSES[loss]))
    if "delta_weight" in settings.get("target", {}):
        settings["target"]["delta_weight"] = weight
    return {
        "delta_weight": weight,
        "seed": seed,
        "name": "run",
        "model": {"student": {"path": "raw/student"}, "teacher": {"path": "big/teacher"}},
        "loss": settings,
        "data": {"_target_": "deltakd.data.InstructionData", "train": "rows.jsonl"},
        "trainer": {"max_steps": 40},
        "optim": {"lr": 0.001},
        "evaluation": {"seeds": [10]},
    }


def answer(row: int, score: float, **changes: Any) -> dict[str, Any]:
    """A scored answer."""
    record = {
        "row_id": row,
        "prompt": f"Answer this.\n\n### Instruction:\nQuestion {row}?\n\n### Response:\n",
        "reference": [f"Right {row}"],
        "output": f"Said {row}",
        "rougeL": score,
        "exact_match": 0.0,
        "decoding": {"do_sample": True, "temperature": 1.0, "max_new_tokens": 64, "seed": 10, "eos_ids": [0]},
    }
    return record | changes


def write_run(
    path: Path,
    loss: str = "sft",
    seed: int = 0,
    *,
    weight: float = 1.0,
    level: float = 20.0,
    rows: int = 30,
    finished: bool = True,
    change: Callable[[Config], None] = lambda config: None,
    record: Mapping[str, Any] | None = None,
    summary: Mapping[str, float] | None = None,
) -> Path:
    """Write a run directory.

    Args:
        path: the directory.
        loss, seed, weight: of its config.
        level: its mean ROUGE-L, about; questions differ in difficulty, which all runs share.
        rows: of its evaluation set ``test``.
        finished: whether it has a summary and answers.
        change: changes the config in place.
        record: changes every answer.
        summary: further scores.
    """
    config = config_of(loss, seed, weight)
    change(config)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    steps = np.arange(1, 41 if finished else 13)
    header = "step,train/ce,train/loss,train/lr,val/loss,val/rougeL\n"
    lines = [f"{s},{3 - s / 40 + seed / 9:.3f},{3 - s / 40:.3f},0.1,," for s in steps]
    lines += [f"{s},,,,{2.5 - s / 40:.3f},{s / 4:.3f}" for s in steps[9::10]]
    (path / "metrics.csv").write_text(header + "\n".join(lines) + "\n")
    if not finished:
        return path
    difficulty = np.random.default_rng(0).normal(0, 8, rows)
    own = np.random.default_rng([seed, len(loss), int(10 * weight)]).normal(0, 1, rows)
    records = [answer(i, float(level + difficulty[i] + own[i]), **(record or {})) for i in range(rows)]
    (path / "generations").mkdir()
    (path / "generations" / "test_seed10.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    meta = {
        "git_commit": "0123456789abcdef-dirty",
        "packages": {"torch": "2.9", "python": "3.12"},
        "machine": "Linux x86_64, 1 threads",
        "device": "cpu",
        "seed": seed,
        "steps": 40,
        "parameters": {"student": 1234},
        "training_seconds": 10.0,
        "seconds": 12.0,
        "tokens_per_second": 1000.0 + seed,
        "peak_memory_mib": 100.0,
        "valid_tokens": 5000,
    }
    scores = {"test/rougeL": level, "val/rougeL": 1.0, **(summary or {})}
    (path / "summary.json").write_text(json.dumps(scores | {"meta": meta}))
    return path
