"""One of our own runs, timed: ``ours.py FOLDER STEPS LOSS [override ...]`` prints what it measured as JSON."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L

from deltakd.runs.configuration import compose_config
from deltakd.runs.training import run_training
from deltakd.types import Batch

#: Optimiser steps before the clock starts: threads, allocators and caches warm up.
WARM_UP = 3


class Clock(L.Callback):
    """Wall time and valid tokens of the training loop after the warm-up, data loading included."""

    started = finished = 0.0
    tokens = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Note the time; count."""
        if trainer.global_step == WARM_UP:
            Clock.started = time.perf_counter()
        elif trainer.global_step > WARM_UP:
            Clock.tokens += batch.step_tokens
            Clock.finished = time.perf_counter()


def main(folder: Path, steps: int, loss: str, extra: list[str]) -> None:
    """Train and print."""
    run_dir = folder / "runs" / "_".join([loss, *(e.split("=")[-1] for e in extra if e.startswith("reference."))])
    shutil.rmtree(run_dir, ignore_errors=True)
    roles = [f"model.{role}.path={folder / role}" for role in ("student", "teacher", "teacher_raw")]
    overrides = [
        "experiment=none",
        f"loss={loss}",
        *roles,
        f"data.train={folder / 'train.jsonl'}",
        "data.max_length=256",
        "data.max_prompt_length=128",
        "data.batch_size=8",
        f"data.cache_dir={folder / 'tokens'}",
        f"trainer.max_steps={steps}",
        "trainer.max_epochs=null",
        "trainer.enable_progress_bar=false",
        "evaluation=none",
        "logger=csv",
        f"+callbacks.clock={{_target_: {__name__}.Clock}}",
        f"run_dir={run_dir}",
        *extra,
    ]
    run_training(compose_config("train", overrides), run_dir)
    meta = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["meta"]
    rate = Clock.tokens / (Clock.finished - Clock.started)
    print(json.dumps({"tokens_per_second": rate, "peak_mib": meta["peak_memory_mib"], "tokens": Clock.tokens}))


if __name__ == "__main__":
    # Hydra finds the clock by the module's name, so this must be that module and not a second one.
    sys.modules["ours"] = sys.modules["__main__"]
    __name__ = "ours"
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
