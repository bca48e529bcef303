"""A training run that counts itself: ``python tests/estimates/measured_run.py OUT key=value ...``, one file a rank.

Bytes of tensors come from the allocator's own record, collectives from the operations that PyTorch dispatches.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed import ProcessGroup
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.training.run import run_training

#: The step that is counted: by then the optimiser has its state, and ZeRO 3 knows the order of the layers.
STEP = 4
MARK = "the measured step"


def tensors_in(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [t for value in values for t in tensors_in(value)] if isinstance(values, list | tuple) else []


class Collectives(TorchDispatchMode):
    """Bytes that each kind of collective is called with: the larger of what goes in and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sides = [sum(t.nbytes for t in tensors_in(arg)) for arg in args if not isinstance(arg, ProcessGroup)]
            self.bytes[func._schema.name.removeprefix("c10d::")] += max(sides, default=0)
        return func(*args, **(kwargs or {}))


class Measure(L.Callback):
    """Counts one optimiser step."""

    def __init__(self) -> None:
        self.collectives, self.flops = Collectives(), FlopCounterMode(display=False)
        self.mark: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == STEP and self.mark is None:
            self.mark = record_function(MARK)
            for context in (self.mark, self.collectives, *self.counts_flops):
                context.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == STEP + 1 and self.mark is not None:
            for context in (*self.counts_flops, self.collectives, self.mark):
                context.__exit__(None, None, None)
            self.mark = None

    @property
    def counts_flops(self) -> list[Any]:
        return [self.flops] if "FLOPS" in os.environ else []


def peak_in_step(record: profile) -> dict[str, int]:
    """The most bytes of tensors within the measured step, and what is there when it begins."""
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    (step,) = [e for e in events if e.name() == MARK]
    start, end = step.start_ns(), step.end_ns()
    now, before, peak = 0, 0, 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if event.start_ns() > end:
            break
        if event.start_ns() < start:
            before = now + event.nbytes()
        now += event.nbytes()
        if event.start_ns() >= start:
            peak = max(peak, now)
    return {"peak": peak, "before": before}


def main(out: Path, overrides: list[str]) -> None:
    measure = Measure()
    settings = replace(make_settings(compose_config("train", overrides)), callbacks={"measure": measure})
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run_training(settings, Path(str(settings.run_dir)))
    found = peak_in_step(record) | {
        "collectives": dict(measure.collectives.bytes),
        "flops": measure.flops.get_total_flops(),
    }
    (out / f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
