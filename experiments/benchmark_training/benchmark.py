"""Valid tokens per second and peak memory of training steps: ours and TRL's, in one run on the same models and rows.

    python experiments/benchmark_training/benchmark.py                       # needs: pip install trl
    python experiments/benchmark_training/benchmark.py --contestants sft kd delta_kd --steps 60
    python experiments/benchmark_training/benchmark.py --size gpt2 --precision bf16-true       # an NVIDIA GPU

Random GPT-2 checkpoints (V = 50,257; ``small``: student 2 layers x 128, teachers 6 x 384; ``gpt2``: GPT-2 124M and XL),
Dolly rows of fewer than 140 words, at most 256 tokens, batch 8, the same rows for all. Each contestant trains in a
process of its own, one after the other, and again for some rounds; the table has the best round (other programs only
ever take time). The caches are made before, in a process of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from prepare import SIZES, make_models, make_rows
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[2] / "shared"

#: Name -> script and arguments after FOLDER, STEPS and PRECISION.
CONTESTANTS = {
    "sft": ("ours.py", ["sft"]),
    "kd": ("ours.py", ["kd"]),
    "delta_kd": ("ours.py", ["delta_kd"]),
    "delta_kd_hidden": ("ours.py", ["delta_kd", "hidden"]),
    "delta_kd_topk": ("ours.py", ["delta_kd", "topk"]),
    "trl_gkd": ("trl_gkd.py", []),
}


def run(name: str, folder: Path, steps: int, precision: str) -> dict[str, float]:
    """Run one contestant and return its measurements."""
    script, extra = CONTESTANTS[name]
    command = [sys.executable, str(HERE / script), str(folder), str(steps), precision, *extra]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=512, help="of the training set")
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-true"])
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark_training"))
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "dolly" / "databricks-dolly-15k.jsonl.gz")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "gpt2")
    options = parser.parse_args()
    folder = options.folder.resolve() / f"{options.size}_{options.precision}"
    make_models(folder, options.tokenizer, SIZES[options.size])
    make_rows(options.data, folder / "train.jsonl", most_words=140, number=options.rows)
    for name in options.contestants:
        if name.endswith(("_hidden", "_topk")):
            command = [sys.executable, str(HERE / "ours.py"), str(folder), "0", options.precision]
            subprocess.run([*command, *CONTESTANTS[name][1]], check=True, cwd=HERE, capture_output=True)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.contestants}
    for _ in range(options.rounds):
        for name in options.contestants:
            results[name].append(run(name, folder, options.steps, options.precision))
            print(name, results[name][-1], flush=True)
    table = Table(title=f"{options.steps} steps, best of {options.rounds}")
    for column in ("contestant", "valid tokens/s", "of the first", "peak MiB", "of the first"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    best = {
        name: (max(r["tokens_per_second"] for r in rounds), min(r["peak_mib"] for r in rounds))
        for name, rounds in results.items()
    }
    rate_1, peak_1 = best[options.contestants[0]]
    for name, (rate, peak) in best.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / rate_1:.2f}", f"{peak:,.0f}", f"{peak / peak_1:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
