"""Time and memory until data is ready to train on, beside TRL's preparation of the same files.

    python experiments/benchmark_data/benchmark.py prepare --tokenizer openai-community/gpt2
    python experiments/benchmark_data/benchmark.py prepare --rows 1000000 --trl-python ~/trl/bin/python
    python experiments/benchmark_data/benchmark.py duplicates

``prepare`` writes files of rows of about 100 tokens, reads and tokenises them in a process of its own, and does so
again: a second start. 500 rows are held out, and the tasks of a set of 200 are kept out of training. TRL tokenises
the same file as its ``SFTTrainer`` does, with the python of an environment that has it; without ``--trl-python`` it is
left out. ``duplicates`` times the search for near duplicates where it is hardest.

Seconds of CPU are those of the process and its children, and say more than the clock on a machine that does other
things, too. Memory is the most that the process had (RSS), and its share of what it has in the end (PSS), in MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from deltakd.io.console import make_console

HELD_OUT, EXCLUDED = 500, 200
LIMITS = {"max_length": 512, "max_prompt_length": 256}
#: Words of an instruction, an input (of every third row) and an answer, on average.
WORDS = (14, 30, 46)


def words_of(tokenizer_path: str) -> list[str]:
    """Return words that are one token each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    texts = (tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab())
    return sorted({text[1:] for text in texts if text[:1] == " " and text.isascii() and text[1:].isalpha()})


def write_rows(path: Path, rows: int, words: Sequence[str], seed: int) -> None:
    """Write rows of words drawn by Zipf's law."""
    generator = np.random.default_rng(seed)
    chances = 1 / np.arange(1, len(words) + 1)
    order = np.array(words, object)[generator.permutation(len(words))]

    def texts(count: int, length: int) -> list[str]:
        lengths = generator.integers(length // 2, 3 * length // 2 + 1, count)
        drawn = order[generator.choice(len(words), int(lengths.sum()), p=chances / chances.sum())]
        return [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]

    with path.open("w", encoding="utf-8") as file:
        for first in range(0, rows, 10_000):
            count = min(10_000, rows - first)
            columns = [texts(count, length) for length in WORDS]
            for number, (asked, given, answer) in enumerate(zip(*columns, strict=True)):
                record = {"instruction": asked, "input": given * (number % 3 == 0), "output": answer}
                file.write(json.dumps(record) + "\n")


def measured(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``work`` returns, with its seconds and this process's memory."""
    wall = time.perf_counter()
    found = work()
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    shares = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line[:4] == "Pss:"]
    return found | {
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(sum(one.ru_utime + one.ru_stime for one in usage), 1),
        "peak_rss_mib": round(max(one.ru_maxrss for one in usage) / 1024),
        "pss_mib": round(int(shares[0][1]) / 1024),
    }


def prepare(folder: Path, rows: int, tokenizer_path: str) -> dict[str, Any]:
    """Get one file ready, as a run does."""
    from transformers import AutoTokenizer

    from deltakd.data import InstructionData
    from deltakd.data.batches.sampler import StepSampler

    data = InstructionData(
        train=str(folder / f"{rows}.jsonl"),
        val_size=HELD_OUT,
        exclude=[str(folder / "excluded.jsonl")],
        cache_dir=str(folder / f"cache-{rows}"),
        **LIMITS,
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)

    def work() -> dict[str, Any]:
        sets = data.load(tokenizer)
        options: dict[str, Any] = {"accumulate": 1, "world_size": 1, "rank": 0, "seed": 1, "max_steps": None}
        sampler = StepSampler(sets.train.lengths, sets.train.valid_tokens, batch_size=8, epochs=1, **options)
        first = [sets.train[int(row)] for row in sampler.micro_batch(0).rows]
        assert len(list(sets.val_rows)) == HELD_OUT
        return {"kept": len(sets.train), "tokens": len(sets.train.input_ids), "batch": len(first)}

    return measured(work)


TRL = """
import json, resource, sys, time
from pathlib import Path
from datasets import load_dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import SFTConfig, SFTTrainer

path, tokenizer_path, out, processes = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=len(tokenizer)))
start = time.perf_counter()
HEAD = "Below is an instruction that describes a task{}. "
HEAD += "Write a response that appropriately completes the request.\\n\\n"
def convert(row):
    head = HEAD.format(", paired with an input that provides further context" if row["input"] else "")
    given = "### Input:\\n" + row["input"] + "\\n\\n" if row["input"] else ""
    prompt = head + "### Instruction:\\n" + row["instruction"] + "\\n\\n" + given + "### Response:\\n"
    return {"prompt": prompt, "completion": row["output"]}
data = load_dataset("json", data_files=path, split="train", cache_dir=out)
processes = int(processes)
data = data.map(convert, remove_columns=data.column_names, num_proc=processes if processes > 1 else None)
config = SFTConfig(output_dir=out, max_length=512, completion_only_loss=True, report_to=[], use_cpu=True,
                   dataset_num_proc=processes if processes > 1 else None)
trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
next(iter(trainer.get_train_dataloader()))
use = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
pss = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line[:4] == "Pss:"]
print("RESULT " + json.dumps({
    "kept": len(trainer.train_dataset), "wall_s": round(time.perf_counter() - start, 1),
    "cpu_s": round(sum(u.ru_utime + u.ru_stime for u in use), 1),
    "peak_rss_mib": round(max(u.ru_maxrss for u in use) / 1024), "pss_mib": round(int(pss[0][1]) / 1024)}))
"""


def run(command: Sequence[str]) -> dict[str, Any]:
    """Run a measurement in a process of its own."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def compare(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield way, rows and what was measured."""
    words = words_of(options.tokenizer)
    write_rows(folder / "excluded.jsonl", EXCLUDED, words, seed=0)
    for rows in options.rows:
        file = folder / f"{rows}.jsonl"
        write_rows(file, rows, words, seed=1)
        own = [sys.executable, __file__, "one", "--rows", str(rows), "--tokenizer", options.tokenizer]
        for start in ("first start", "second start"):
            yield f"deltakd, {start}", rows, run([*own, "--folder", str(folder)])
        if options.trl_python is None:
            continue
        for start in ("first start", "second start"):
            out = str(folder / f"trl-{rows}")
            command = [options.trl_python, "-c", TRL, str(file), options.tokenizer, out, str(options.processes)]
            yield f"TRL, {start}", rows, run(command)


def duplicates() -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield the hard cases of the search, each with its seconds."""
    from deltakd.data import find_overlaps
    from deltakd.data.sources.rows import Row

    generator = np.random.default_rng(0)
    frame = " ".join(f"frame{word}" for word in range(60))

    def text(length: int) -> str:
        return " ".join(f"w{word}" for word in generator.integers(0, 20_000, length))

    cases: dict[str, Callable[[int], Row]] = {
        "one instruction": lambda n: Row(n, "Summarise the following passage in one sentence.", text(30)),
        "different texts": lambda n: Row(n, text(20), text(30) if n % 3 == 0 else ""),
        "one frame, inline": lambda n: Row(n, f"{frame} {text(8)}"),
    }
    for name, make in cases.items():
        train, test = [make(n) for n in range(100_000)], [make(n) for n in range(2_000)]
        start, wall = time.process_time(), time.perf_counter()
        found = len(find_overlaps(test, train))
        seconds = {"cpu_s": time.process_time() - start, "wall_s": time.perf_counter() - wall}
        yield name, len(train), {"found": found} | {key: round(value, 1) for key, value in seconds.items()}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "duplicates", "one"], help="`one` is what `prepare` calls")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--tokenizer", default="openai-community/gpt2", help="path, or name on the hub")
    parser.add_argument("--trl-python", help="python of an environment that has trl")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="TRL's dataset_num_proc")
    parser.add_argument("--folder", type=Path, help="for the files; a temporary one by default")
    return parser.parse_args(arguments)


def main() -> None:
    """Run what the command line asks for, and print a table."""
    options = parse()
    if options.what == "one":
        print("RESULT " + json.dumps(prepare(options.folder, options.rows[0], options.tokenizer)))
        return
    if options.what == "prepare" and options.trl_python is None:
        print("TRL is left out: give the python of an environment that has it with --trl-python")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = list(duplicates() if options.what == "duplicates" else compare(options, folder))
    columns = list(dict.fromkeys(key for *_, values in found for key in values))
    table = Table("way", "rows", *columns)
    for way, rows, values in found:
        table.add_row(way, f"{rows:,}", *(str(values.get(column, "")) for column in columns))
    make_console().print(table)


if __name__ == "__main__":
    main()
