"""Compare every strategy with a single process: ``python experiments/scale/compare.py OVERRIDE...``."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

FOLDER = Path("outputs/scale")
#: What is compared by default: a strategy, and how it holds the references.
CONTESTANTS = (
    "ddp",
    "ddp+shard",
    "deepspeed_zero1",
    "deepspeed_zero2",
    "deepspeed_zero3",
    "deepspeed_zero3+shard",
    "deepspeed_zero3_offload+shard",
    "fsdp",
    "fsdp+shard",
)


class Outcome(NamedTuple):
    """The outcome of a run.

    Args:
        losses: of each logged step and each validation.
        student: name -> tensor.
        meta: of ``summary.json``.
    """

    losses: list[float]
    student: dict[str, Any]
    meta: dict[str, Any]


def train(name: str, overrides: list[str]) -> Outcome:
    """Run ``python -m deltakd.train`` in a directory of its own."""
    directory = FOLDER / name
    shutil.rmtree(directory, ignore_errors=True)
    fixed = [f"run_dir={directory}", "logger=csv", "evaluation=none", "trainer.enable_progress_bar=false"]
    by_key = {override.split("=", 1)[0]: override for override in [*overrides, *fixed]}
    command = [sys.executable, "-m", "deltakd.train", *by_key.values()]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    with (directory / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row[key]) for key in ("train/loss", "val/loss") for row in rows if row.get(key)]
    meta = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["meta"]
    return Outcome(losses, load_file(directory / "student" / "model.safetensors"), meta)


def row(name: str, outcome: Outcome, one: Outcome) -> list[str]:
    """Return a run's line in the table."""
    pairs = list(zip(outcome.losses, one.losses, strict=True))
    loss = max(abs(a - b) / abs(b) for a, b in pairs)
    weights = max(float((outcome.student[k].float() - one.student[k].float()).abs().max()) for k in one.student)
    resident = outcome.meta["resident_mib"]
    held = [f"{resident[role]:.2f}" if role in resident else "" for role in ("student", "teacher")]
    return [name, f"{loss:.1e}", f"{weights:.1e}", *held, f"{outcome.meta['tokens_per_second']:,.0f}"]


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="of an optimiser step, over all processes")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), metavar="STRATEGY[+shard]")
    parser.add_argument("overrides", nargs="*", help="of all runs, as for deltakd.train")
    options = parser.parse_args()
    common = ["trainer.max_steps=20", "trainer.log_every_n_steps=1", *options.overrides]
    one = train("one", [*common, f"data.batch_size={options.rows}"])
    title = f"{options.processes} processes beside one"
    table = Table("strategy", "loss, rel.", "weights, abs.", "student MiB", "teacher MiB", "tokens/s", title=title)
    table.add_row(*row("one process", one, one))
    split = [f"trainer.devices={options.processes}", f"data.batch_size={options.rows // options.processes}"]
    for name in options.contestants:
        strategy, _, sharding = name.partition("+")
        kept = [] if "zero3" not in strategy else ["strategy.persistence_threshold=0"]
        chosen = [f"strategy={strategy}", *kept, f"reference.sharding={sharding or 'replicate'}"]
        table.add_row(*row(name, train(name, [*common, *split, *chosen]), one))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
