"""What a cache of references saves, on the models of experiments/dolly_cpu.

    python -m deltakd.study experiments/dolly_cpu              # its first three stages make the models
    python experiments/benchmark_cache/benchmark.py steps      # a training step: SFT, cached, live, taking turns
    python experiments/benchmark_cache/benchmark.py weights    # 8 values of the delta weight, 3 passes each
    python experiments/benchmark_cache/benchmark.py weights --teacher 8 192     # random teachers of 8 layers x 192

``steps`` runs forward, loss and backward of the same micro-batches under each way, some rounds in turn; a way's time is
the sum over batches of its fastest round. Beside it stand the operations of the matrix products that it needs.
``weights`` times the commands that a user would type: ``deltakd.cache`` and a multirun of ``deltakd.train``, against
the multirun with live references; nothing is evaluated.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from deltakd.cache import make_cache
from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.run_directory import RunDirectory
from deltakd.training.assembly import load_parts
from deltakd.training.fit import make_data, make_module
from deltakd.training.module import DistillationModule
from deltakd.types import STUDENT, Batch

STORES = {"hidden": ["reference.store=hidden"], "topk": ["reference.store=topk", "reference.k=64"]}
SFT, TOPK, HIDDEN, LIVE = "sft", "delta_kd, cached topk (K = 64)", "delta_kd, cached hidden", "delta_kd, live"
WEIGHTS = "0.25,0.5,0.75,1.0,1.25,1.5,1.75,2.0"


def make_teachers(models: Path, folder: Path, layers: int, width: int) -> None:
    """Make a random teacher and raw teacher with the study's tokenizer; they are as fast as trained ones."""
    tokenizer = AutoTokenizer.from_pretrained(models / "pretrain_student" / "student")
    shape = {"n_layer": layers, "n_embd": width, "n_head": width // 32, "n_positions": 256}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    config = GPT2Config(**shape, **ends, vocab_size=len(tokenizer))
    for seed, role in enumerate(("teacher", "teacher_raw")):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


def common(models: Path, folder: Path, rows: int, loss: str = "delta_kd") -> list[str]:
    """Return the overrides that all ways share."""
    stages = {"student": "pretrain_student", "teacher": "sft_teacher", "teacher_raw": "pretrain_teacher"}
    paths = {role: models / stage / "student" for role, stage in stages.items()}
    paths |= {role: folder / role for role in paths if (folder / role).is_dir()}
    return [
        "experiment=dolly_cpu",
        f"loss={loss}",
        *(f"model.{role}.path={path}" for role, path in paths.items()),
        f"data.limit={rows}",
        "data.val=null",
        f"data.cache_dir={folder / 'tokens'}",
        "evaluation=none",
        "logger=csv",
        "trainer.enable_progress_bar=false",
    ]


def cached(path: Path) -> list[str]:
    """Return the overrides for training from a cache."""
    return ["reference=cached", f"reference.path={path}"]


def make(store: str, folder: Path, overrides: Sequence[str]) -> Path:
    """Make a new cache."""
    path = folder / store
    shutil.rmtree(path, ignore_errors=True)
    make_cache([*overrides, *cached(path), *STORES[store]])
    return path


def load(overrides: Sequence[str], folder: Path, batches: int) -> tuple[DistillationModule, list[Batch]]:
    """Return a module and its first batches."""
    parts = load_parts(make_settings(compose_config("train", list(overrides))), RunDirectory(folder / "none"))
    data = make_data(parts, ranks=1)
    return make_module(parts, data.total_steps), list(islice(iter(data.train_dataloader()), batches))


def step(module: DistillationModule, batch: Batch) -> None:
    """Run forward, loss and backward."""
    total, _ = module.step(batch)
    (total / batch.step_tokens).backward()
    module.zero_grad()


def operations(live: DistillationModule, batches: Sequence[Batch]) -> dict[str, int]:
    """Return the floating-point operations of each way's matrix products.

    Bodies: the forward pass as torch counts it, and twice that for the backward pass. Heads: one product each, and two
    more for the student's gradients.
    """
    sources = live.step.references
    assert sources is not None, "a loss that reads no references"
    student, references, heads = 0, 0, dict.fromkeys([STUDENT, *sources.roles], 0)
    for batch in batches:
        for count, run in (("student", live.student), ("references", sources)):
            with FlopCounterMode(display=False) as counter:
                found = run(batch)
            if count == "student":
                student += counter.get_total_flops()
            else:
                references += counter.get_total_flops()
            for role, head in (found if count == "references" else {STUDENT: found}).items():
                heads[role] += 2 * len(head) * head.weight.numel()
    sft = 3 * student + 3 * heads[STUDENT]
    hidden = sft + sum(count for role, count in heads.items() if role != STUDENT)
    return {SFT: sft, TOPK: sft, HIDDEN: hidden, LIVE: hidden + references}


def steps(options: argparse.Namespace) -> None:
    """Time training steps and print the table."""
    overrides = common(options.models, options.folder, options.rows)
    caches = {store: make(store, options.folder, overrides) for store in STORES}
    ways = {
        SFT: common(options.models, options.folder, options.rows, "sft"),
        TOPK: [*overrides, *cached(caches["topk"])],
        HIDDEN: [*overrides, *cached(caches["hidden"])],
        LIVE: overrides,
    }
    loaded = {name: load(way, options.folder, options.batches) for name, way in ways.items()}
    flops = operations(*loaded[LIVE])
    fastest = {name: np.full(options.batches, np.inf) for name in ways}
    for _ in range(options.rounds):
        for number in range(options.batches):
            for name, (module, batches) in loaded.items():
                started = time.perf_counter()
                step(module, batches[number])
                fastest[name][number] = min(fastest[name][number], time.perf_counter() - started)
    batches = loaded[SFT][1]
    tokens = sum(len(batch.labels_N) for batch in batches) / len(batches)
    table = Table(
        title=f"{options.batches} batches of 16 rows, {tokens:.0f} valid tokens each, best of {options.rounds}"
    )
    for column in ("way", "ms a step", "of sft", "operations, of sft", "time / operations"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name in ways:
        ratio = fastest[name].sum() / fastest[SFT].sum()
        need = flops[name] / flops[SFT]
        table.add_row(name, f"{1e3 * fastest[name].mean():.1f}", f"{ratio:.2f}", f"{need:.2f}", f"{ratio / need:.2f}")
    Console(width=120).print(table)


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that ``run`` takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def weights(options: argparse.Namespace) -> None:
    """Time the sweep over delta weights, with and without a cache."""
    overrides = [*common(options.models, options.folder, options.rows), "trainer.max_epochs=3"]

    def multirun(name: str, extra: Sequence[str]) -> float:
        place = options.folder / name
        shutil.rmtree(place, ignore_errors=True)
        command = [sys.executable, "-m", "deltakd.train", "--multirun", *overrides, *extra]
        command += [f"delta_weight={WEIGHTS}", f"hydra.sweep.dir={place}"]
        return timed(lambda: subprocess.run(command, check=True, capture_output=True))

    path = options.folder / "sweep_cache"
    shutil.rmtree(path, ignore_errors=True)
    command = [sys.executable, "-m", "deltakd.cache", *overrides, *cached(path), *STORES["topk"]]
    making = timed(lambda: subprocess.run(command, check=True, capture_output=True))
    print(f"the cache: {making:.1f} s", flush=True)
    from_cache = multirun("from_cache", cached(path))
    print(f"8 runs from it: {from_cache:.1f} s", flush=True)
    live = multirun("live", [])
    print(f"8 live runs: {live:.1f} s; cache and runs from it / live: {(making + from_cache) / live:.3f}")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "weights"])
    parser.add_argument("--models", type=Path, default=Path("outputs/dolly_cpu"))
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark_cache"))
    parser.add_argument("--teacher", type=int, nargs=2, metavar=("LAYERS", "WIDTH"), help="default: the study's")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    options.folder, options.models = options.folder.resolve(), options.models.resolve()
    if not (options.models / "sft_teacher" / "student").is_dir():
        raise SystemExit(
            f"{options.models} has no sft_teacher/student: run `python -m deltakd.study experiments/dolly_cpu`"
        )
    for role in ("teacher", "teacher_raw"):
        shutil.rmtree(options.folder / role, ignore_errors=True)
    if options.teacher:
        make_teachers(options.models, options.folder, *options.teacher)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    steps(options) if options.what == "steps" else weights(options)


if __name__ == "__main__":
    main()
