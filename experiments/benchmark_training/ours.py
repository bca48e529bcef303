"""One of our own runs, timed: ``ours.py FOLDER STEPS PRECISION LOSS [STORE]`` prints what it measured as JSON.

With a STORE (``hidden`` or ``topk``) the references come from a cache, which 0 STEPS make.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L

from deltakd.cache import make_cache
from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.training.run import run_training
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


def main(folder: Path, steps: int, precision: str, loss: str, store: str | None = None) -> None:
    """Train and print."""
    cache = folder / f"cache_{store}"
    run_dir = folder / "runs" / (loss if store is None else f"{loss}_{store}")
    shutil.rmtree(run_dir, ignore_errors=True)
    roles = [f"model.{role}.path={folder / role}" for role in ("student", "teacher", "teacher_raw")]
    overrides = [
        f"loss={loss}",
        *roles,
        f"data.train={folder / 'train.jsonl'}",
        "data.max_length=256",
        "data.max_prompt_length=128",
        "data.batch_size=8",
        f"data.cache_dir={folder / 'tokens'}",
        f"trainer.max_steps={max(steps, 1)}",
        f"trainer.precision={precision}",
        "trainer.max_epochs=null",
        "trainer.enable_progress_bar=false",
        "evaluation=none",
        "logger=csv",
        f"+callbacks.clock={{_target_: {__name__}.Clock}}",
        f"run_dir={run_dir}",
    ]
    if precision == "bf16-true":
        overrides += [f"model.{role}.dtype=bfloat16" for role in ("teacher", "teacher_raw")]
    if store is not None:
        overrides += ["reference=cached", f"reference.path={cache}", f"reference.store={store}"]
        overrides += ["reference.k=64"] if store == "topk" else []
    if steps == 0:
        shutil.rmtree(cache, ignore_errors=True)
        make_cache(overrides)
        return
    run_training(make_settings(compose_config("train", overrides)), run_dir)
    meta = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["meta"]
    rate = Clock.tokens / (Clock.finished - Clock.started)
    print(json.dumps({"tokens_per_second": rate, "peak_mib": meta["peak_memory_mib"], "tokens": Clock.tokens}))


if __name__ == "__main__":
    # Hydra finds the clock by the module's name, so this must be that module and not a second one.
    sys.modules["ours"] = sys.modules["__main__"]
    __name__ = "ours"
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
