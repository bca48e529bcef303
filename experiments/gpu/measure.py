"""Checks and measures everything that needs a GPU, part by part, and prints one table (README.md).

    python experiments/gpu/measure.py --out outputs/gpu                       # one NVIDIA GPU, less than 8 minutes
    python experiments/gpu/measure.py --out outputs/gpu --device cpu          # a rehearsal with tiny sizes

Each part is a process of its own with a budget of seconds. What it has measured by then is in ``<out>/<part>.json``;
its output is in ``<out>/<part>.log``. A part that fails or runs out of time costs the others nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: Seconds that an interrupted part has to end by itself.
GRACE = 5


@dataclass(frozen=True)
class Part:
    """A command.

    Args:
        name: of its log and its results.
        budget: seconds.
        command: arguments for Python.
        tiny: arguments added in a rehearsal.
        large: arguments added on a GPU.
    """

    name: str
    budget: int
    command: tuple[str, ...]
    tiny: tuple[str, ...] = ()
    large: tuple[str, ...] = ()


QWEN = ("kd", "delta_kd", "delta_kd_lora", "sft", "kd_lora", "sft_lora")
#: One core would compile the tests' 150 or so kernels for minutes.
SIDE_BY_SIDE = ("-n", "8") if importlib.util.find_spec("xdist") else ()
#: In the order in which they run: the most valuable first.
PARTS = (
    Part("kernel_tests", 60, ("-m", "pytest", "tests/kernels"), ("-k", "products", "-x"), SIDE_BY_SIDE),
    Part(
        "serving_tests", 19, ("-m", "pytest", *(f"tests/references/serving/test_{n}.py" for n in ("cuda_ipc", "links")))
    ),
    Part("loss", 80, ("loss.py",), ("--tokens", "64", "--width", "32", "--vocabulary", "512")),
    Part("step_gpt2", 110, ("step.py",), ("--shape", "tiny_gpt2", "--batch", "4", "--length", "32", "--steps", "2")),
    Part("correctness", 80, ("correctness.py",), ("--steps", "6")),
    Part(
        "step_qwen",
        90,
        ("step.py", "--shape", "qwen", "--batch", "16", "--steps", "8", "--contestants", *QWEN),
        ("--shape", "tiny_qwen", "--batch", "4", "--length", "32", "--steps", "2"),
    ),
    Part(
        "generation",
        40,
        ("generation.py",),
        (
            "--shapes",
            "tiny_gpt2",
            "tiny_qwen",
            "--batch",
            "4",
            "--prompt",
            "8",
            "--new_tokens",
            "8",
            "--dtype",
            "float32",
        ),
    ),
)


def run(part: Part, options: argparse.Namespace) -> dict[str, Any]:
    """Run a part; return how it ended."""
    arguments = list(part.command)
    if arguments[0] != "-m":
        arguments = [str(HERE / arguments[0]), *arguments[1:], "--device", options.device, "--out", str(options.out)]
    arguments += part.tiny if options.device == "cpu" else part.large
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    began = time.monotonic()
    with (options.out / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returned = process.wait(part.budget * options.budget)
            status = "done" if returned == 0 else f"exit status {returned}"
        except subprocess.TimeoutExpired:
            status = "out of time"
            # Interrupted, pytest still sums up what has passed and failed.
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            # With what it started, which would go on holding the GPU's memory.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = (options.out / f"{part.name}.log").read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else ""
    return {"part": part.name, "status": status, "seconds": round(time.monotonic() - began, 1), "last": last[:200]}


def table(out: Path, ended: Sequence[dict[str, Any]]) -> str:
    """Return the results as text: a line for each part, then one for each row."""
    text = [f"{e['part']:14} {e['status']:16} {e['seconds']:6.1f} s   {e['last'][:90]}" for e in ended]
    for path in sorted(out.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "rows" not in content:
            continue
        machine, setting = content["machine"], content["setting"]
        text += ["", f"{content['part']}: {machine['card']}, torch {machine['torch']}, commit {machine['commit']}"]
        text.append("  " + " ".join(f"{key}={_short(value)}" for key, value in setting.items() if key != "contestants"))
        for row in content["rows"]:
            shown = (f"{key}={_short(value)}" for key, value in row.items() if key not in ("name", "loss", "form"))
            text.append(f"  {row['name']:28} " + " ".join(shown))
    return "\n".join(text)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--budget", type=float, default=1.0, help="factor on every part's seconds")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    ended: list[dict[str, Any]] = []
    for part in PARTS:
        if part.name in options.parts:
            ended.append(run(part, options))
            print(ended[-1], flush=True)
            (options.out / "parts.json").write_text(json.dumps(ended, indent=1), encoding="utf-8")
    text = table(options.out, ended)
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
