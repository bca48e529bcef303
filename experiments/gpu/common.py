"""What the parts share: results that are on disk at once, clocks that wait for the device, the machine's rates."""

from __future__ import annotations

import gc
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Results:
    """The rows of one part, written to ``<out>/<part>.json`` after each, so that an early end loses none.

    Args:
        out: the folder.
        part: names the file.
        setting: what all rows share, such as sizes.
    """

    def __init__(self, out: Path, part: str, setting: Mapping[str, Any]) -> None:
        self.path = out / f"{part}.json"
        self.content: dict[str, Any] = {"part": part, "setting": dict(setting), "machine": machine(), "rows": []}
        out.mkdir(parents=True, exist_ok=True)

    def add(self, **row: Any) -> None:
        """Add a row."""
        self.content["rows"].append(row)
        # A part may be killed at any moment: the file is always whole.
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        new.replace(self.path)
        print(row, flush=True)

    def attempt(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> None:
        """Add what ``measure`` returns; if it fails, its error instead, and go on."""
        try:
            self.add(name=name, **measure())
        except Exception as error:  # one that fails must not cost the others their minutes
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            self.add(name=name, error=f"{type(error).__name__}: {first[:300]}")
        # A Trainer and its module refer to each other, and so keep a whole model alive until they are collected.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def machine() -> dict[str, str]:
    """Return card, versions, commit and time."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return {
        "card": card,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def wait() -> None:
    """Wait for the GPU, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], least: float = 0.3, most_rounds: int = 20) -> float:
    """Return the fastest of some rounds, after one to warm up."""
    run()
    times: list[float] = []
    while len(times) < 2 or (sum(times) < least and len(times) < most_rounds):
        wait()
        began = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - began)
    return min(times)


def peak_gib(run: Callable[[], object]) -> float:
    """Return the peak of memory that a run takes beyond what was there, in GiB; NaN without a GPU."""
    if not torch.cuda.is_initialized():
        run()
        return float("nan")
    wait()
    torch.cuda.reset_peak_memory_stats()
    there = torch.cuda.memory_allocated()
    run()
    wait()
    return (torch.cuda.max_memory_allocated() - there) / 2**30


def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Return the machine's own rates: TFLOP/s of a large product, TB/s of a copy (read and write counted)."""
    size, length = (8192, 2**30) if device == "cuda" else (512, 2**24)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    large = torch.empty(length, dtype=torch.uint8, device=device)
    product, copy = seconds_of(lambda: a @ b), seconds_of(large.clone)
    return {"tflops": 2 * size**3 / product / 1e12, "tb_per_s": 2 * length / copy / 1e12}


def script(name: str, *arguments: str) -> list[str]:
    """Return the command of a part's script."""
    return [sys.executable, str(HERE / name), *arguments]
