"""Correctness on the device, with tiny models through ``run_training``: the CPU's losses, kill and resume, FSDP2.

Each row compares two curves of training losses, ``largest`` being the largest relative difference. ``float32`` and
``bf16-mixed``: the device and the CPU; ``resumed``: a run stopped by SIGTERM half way and continued, and one that was
not; ``fsdp``: ``strategy=fsdp`` on one device, and none.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from common import Results

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import Stopped
from deltakd.training.run import run_training
from tests.tiny import World, make_rows, save_model, write_rows

#: What rounding allows, relative to the loss.
ALLOWED = {"float32": 1e-3, "bf16-mixed": 2e-2, "resumed": 1e-4, "fsdp": 1e-3}


class Kill(L.Callback):
    """Sends SIGTERM to this process at the start of a step."""

    #: None: never.
    step: int | None = None

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Send."""
        if trainer.global_step == Kill.step:
            os.kill(os.getpid(), signal.SIGTERM)


def make_world(root: Path) -> World:
    """Make the world of the test suite, without dropout: generators differ between devices."""
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    save_model(root / "student_raw", seed=1, width=32, **still)
    save_model(root / "teacher_raw", seed=2, width=48, **still)
    save_model(root / "teacher", seed=3, width=48, **still)
    for name, rows, seed in (("train", 80, 1), ("val", 8, 2), ("test", 6, 3)):
        write_rows(root / f"{name}.jsonl", make_rows(rows, seed))
    return World(root)


def curve(world: World, steps: int, name: str, *extra: str, kill: int | None = None) -> list[float]:
    """Train, and return the losses of all steps."""
    run_dir = world.root / "runs" / name
    overrides = world.overrides(run_dir, "delta_kd", f"trainer.max_steps={steps}", "optim.lr=0.002", *extra)
    if kill is not None:
        Kill.step = kill
        overrides.append(f"+callbacks.kill={{_target_: {__name__}.Kill}}")
        try:
            run_training(make_settings(compose_config("train", overrides)), run_dir)
            raise RuntimeError("SIGTERM did not stop the run")
        except Stopped:
            overrides.append("resume=true")
        Kill.step = None
    run_training(make_settings(compose_config("train", overrides)), run_dir)
    with (run_dir / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def compared(name: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Return the largest relative difference of two curves."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} steps")
    largest = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return {"steps": len(ours), "largest": largest, "allowed": ALLOWED[name], "ok": largest <= ALLOWED[name]}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    steps, device = options.steps, f"trainer.accelerator={'gpu' if options.device == 'cuda' else 'cpu'}"
    results = Results(options.out, "correctness", {"device": options.device, "steps": steps})
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        cpu = curve(world, steps, "cpu", "trainer.accelerator=cpu")
        there: dict[str, list[float]] = {}

        def train(name: str, *extra: str, kill: int | None = None) -> list[float]:
            there[name] = curve(world, steps, name, device, *extra, kill=kill)
            return there[name]

        mixed = "trainer.precision=bf16-mixed"
        results.attempt("float32", lambda: compared("float32", train("float32"), cpu))
        results.attempt("bf16-mixed", lambda: compared("bf16-mixed", train("bf16-mixed", mixed), cpu))
        results.attempt("resumed", lambda: compared("resumed", train("resumed", kill=steps // 2), there["float32"]))
        sharded = ("strategy=fsdp", "trainer.devices=1")
        results.attempt("fsdp", lambda: compared("fsdp", train("fsdp", *sharded), there["float32"]))


if __name__ == "__main__":
    main()
