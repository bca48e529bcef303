"""One of our own on-policy runs, timed: ``ours.py FOLDER STEPS BATCH NEW_TOKENS PRECISION LOSS`` prints JSON."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.rollouts.data import RolloutData
from deltakd.tracking.environment import peak_memory_mib
from deltakd.training.run import run_training
from deltakd.types import Batch

#: Optimiser steps before the clock starts: threads, allocators and caches warm up.
WARM_UP = 2


class Clock(L.Callback):
    """Wall time, CPU time, time spent on responses, and their tokens, of the whole loop after the warm-up."""

    started = finished = (0.0, 0.0, 0.0)
    tokens = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Note the time; count."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, RolloutData)
        assert data.loader is not None
        now = (time.perf_counter(), time.process_time(), data.loader.seconds)
        if trainer.global_step == WARM_UP:
            Clock.started = now
        elif trainer.global_step > WARM_UP:
            Clock.tokens += batch.step_tokens
            Clock.finished = now


def main(folder: Path, steps: int, batch: int, new_tokens: int, precision: str, loss: str) -> None:
    """Train and print."""
    run_dir = folder / "runs" / loss
    shutil.rmtree(run_dir, ignore_errors=True)
    overrides = [
        f"loss={loss}",
        "loss.ce_weight=0",
        *(f"model.{role}.path={folder / role}" for role in ("student", "teacher", "teacher_raw")),
        f"data.train={folder / 'prompts.jsonl'}",
        f"data.max_length={512 + new_tokens}",
        f"data.max_prompt_length={512}",
        f"data.batch_size={batch}",
        f"data.cache_dir={folder / 'tokens'}",
        "rollout=student",
        f"rollout.batch_size={batch}",
        f"rollout.decoding.max_new_tokens={new_tokens}",
        f"trainer.max_steps={steps}",
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
    run_training(make_settings(compose_config("train", overrides)), run_dir)
    wall, cpu, writing = (end - start for end, start in zip(Clock.finished, Clock.started, strict=True))
    measured = {"tokens": Clock.tokens, "wall_s": wall, "cpu_s": cpu, "writing_s": writing}
    print(json.dumps(measured | {"peak_mib": peak_memory_mib()}))


if __name__ == "__main__":
    # Hydra finds the clock by the module's name, so this must be that module and not a second one.
    sys.modules["ours"] = sys.modules["__main__"]
    __name__ = "ours"
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
