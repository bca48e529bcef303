"""On-policy distillation, generation and training together: ours and TRL's, in one run on the same models and prompts.

    python experiments/benchmark_on_policy/benchmark.py                             # needs: pip install trl
    python experiments/benchmark_on_policy/benchmark.py --trl-python ~/trl/bin/python
    python experiments/benchmark_on_policy/benchmark.py --size gpt2 --precision bf16-true       # an NVIDIA GPU

Random GPT-2 checkpoints (V = 50,257; ``small``: student 2 layers x 128, teachers 6 x 384; ``gpt2``: GPT-2 124M and XL)
without dropout, Dolly prompts, and as many new tokens for every response: random students don't end theirs. Each
contestant trains in a process of its own, one after the other, and again for some rounds, since the machine's speed
varies. Time is that of the whole loop after the warm-up, generation, optimiser and logging included; memory is the
process's peak. A ratio is taken within a round, and the table has its median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from prepare import SIZES, load_tokenizer, make_models, make_prompts
from rich.table import Table

from deltakd.io.console import make_console

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[2] / "shared"

#: Name -> script, and its last argument. The first contestant is what the others are divided by.
CONTESTANTS = {
    "trl_distillation": ("trl_on_policy.py", "distillation"),
    "trl_gkd": ("trl_on_policy.py", "gkd"),
    "kd_reverse": ("ours.py", "kd_reverse"),
    "opd": ("ours.py", "opd"),
    "delta_kd_reverse": ("ours.py", "delta_kd_reverse"),
    "delta_opd": ("ours.py", "delta_opd"),
}

Measured = dict[str, float]


def run(name: str, folder: Path, options: argparse.Namespace) -> Measured:
    """Run one contestant and return its measurements."""
    script, last = CONTESTANTS[name]
    python = options.trl_python if script.startswith("trl") else sys.executable
    numbers = (options.steps, options.batch, options.new_tokens, options.precision)
    command = [python, str(HERE / script), str(folder), *map(str, numbers), last]
    variables = os.environ | ({"OMP_NUM_THREADS": str(options.threads)} if options.threads else {})
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=variables)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: Measured = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def table_of(results: dict[str, list[Measured]], title: str) -> Table:
    """Return the table: medians over rounds, and medians of the ratios within rounds."""
    table = Table(title=title)
    columns = ("tokens/s", "of the first", "tokens/CPU s", "of the first", "generation", "peak MiB", "of the first")
    table.add_column("contestant")
    for column in columns:
        table.add_column(column, justify="right")
    first = next(iter(results.values()))
    for name, rounds in results.items():
        cells = [name]
        for seconds in ("wall_s", "cpu_s"):
            rates = [one["tokens"] / one[seconds] for one in rounds]
            bases = [one["tokens"] / one[seconds] for one in first]
            ratios = [rate / base for rate, base in zip(rates, bases, strict=True)]
            cells += [f"{statistics.median(rates):,.0f}", f"{statistics.median(ratios):.2f}"]
        cells.append(f"{statistics.median(one['writing_s'] / one['wall_s'] for one in rounds):.0%}")
        peaks = [one["peak_mib"] for one in rounds]
        ratio = statistics.median(one["peak_mib"] / base["peak_mib"] for one, base in zip(rounds, first, strict=True))
        table.add_row(*cells, f"{statistics.median(peaks):,.0f}", f"{ratio:.2f}")
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="prompts of an optimiser step")
    parser.add_argument("--new-tokens", type=int, default=128, help="of every response")
    parser.add_argument("--longest", type=int, default=128, help="prompts have at most this many tokens")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of every contestant; default: as set outside")
    parser.add_argument("--trl-python", default=sys.executable, help="python of an environment that has trl")
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-true"])
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark_on_policy"))
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "dolly" / "databricks-dolly-15k.jsonl.gz")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "gpt2")
    options = parser.parse_args()
    folder = options.folder.resolve() / f"{options.size}_{options.precision}"
    tokenizer = load_tokenizer(options.tokenizer)
    make_models(folder, tokenizer, SIZES[options.size])
    prompts = options.steps * options.batch
    lengths = make_prompts(options.data, folder / "prompts.jsonl", tokenizer, options.longest, prompts)
    results: dict[str, list[Measured]] = {name: [] for name in options.contestants}
    for _ in range(options.rounds):
        for name in options.contestants:
            results[name].append(run(name, folder, options))
            print(name, {key: round(value, 1) for key, value in results[name][-1].items()}, flush=True)
    title = (
        f"{options.steps} steps of {options.batch} prompts ({statistics.mean(lengths):.0f} tokens on average), "
        f"{options.new_tokens} new tokens each; medians of {options.rounds} rounds"
    )
    make_console().print(table_of(results, title))


if __name__ == "__main__":
    main()
