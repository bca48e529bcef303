"""Answers to 200 prompts under 5 sampling seeds: ours, beside a plain loop of ``model.generate``.

    python experiments/benchmark_generation/benchmark.py                        # random weights, EOS by chance
    python experiments/benchmark_generation/benchmark.py --model outputs/dolly_cpu/sft_teacher/student
    OMP_NUM_THREADS=2 python experiments/benchmark_generation/benchmark.py --new-tokens 64

The plain loop takes 64 prompts at a time in the order of the file, padded on the left, once for each seed, and samples
at temperature 1 from all tokens. Ours has 64 answers in flight at most. The two take turns; counted are the tokens that
an answer keeps, its EOS included. Beside wall time stands the CPU time of the process: other programs disturb it less.
First, greedy answers are compared with ``model.generate(do_sample=False)``.

Without ``--model``, a GPT-2 of random weights whose head has a bias on EOS: lengths of answers are geometrically
distributed about ``--mean-length``. Without ``--tokenizer``, prompts are random tokens, about as many as the rows have.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from deltakd.data import InstructionData, read_rows
from deltakd.evaluation.answers import make_set
from deltakd.generation import Decoding, generate
from deltakd.generation.model_step import end_tokens
from deltakd.models import ModelSettings, load_tokenizer
from deltakd.models.roles import open_exported, vocabulary_of
from deltakd.models.tokenizers import pad_id

PROMPTS = "../shared/data/dolly/minillm_dolly_test.jsonl.gz"
BATCH, POSITIONS = 64, 256
SEEDS = (10, 20, 30, 40, 50)


@dataclass(frozen=True)
class Work:
    """A model, prompts of token ids, the tokens that end an answer, V, and what to pad with."""

    model: PreTrainedModel
    prompts: list[list[int]]
    eos_ids: frozenset[int]
    vocab_size: int
    pad: int


def random_model(vocab_size: int, eos: int, mean_length: float) -> PreTrainedModel:
    """Return the untrained student of experiments/dolly_cpu, with a bias that makes EOS likely enough."""
    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_embd": 64, "n_head": 2, "n_positions": POSITIONS, "vocab_size": vocab_size}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=eos, eos_token_id=eos, pad_token_id=0))
    bias = torch.zeros(vocab_size)
    bias[eos] = math.log((vocab_size - 1) / (mean_length - 1))
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model.eval()


def load(options: argparse.Namespace) -> Work:
    """Load the work that the command line asks for."""
    if not options.prompts.exists():
        raise SystemExit(f"{options.prompts} is not there: give --prompts FILE (JSON lines as data.train takes them).")
    rows = read_rows(str(options.prompts), limit=options.rows)
    path = options.tokenizer or options.model
    if path is None:
        generator = torch.Generator().manual_seed(0)
        lengths = [40 + int(1.3 * len(str(row).split())) for row in rows]
        prompts = [torch.randint(2, 8000, (min(n, 128),), generator=generator).tolist() for n in lengths]
        return Work(random_model(8000, 1, options.mean_length), prompts, frozenset({1}), 8000, 0)
    tokenizer = load_tokenizer(str(path), "--tokenizer")
    vocab_size = vocabulary_of(tokenizer)
    data = InstructionData(train=str(options.prompts), max_length=192, max_prompt_length=128)
    prompts = make_set("prompts", rows, data, tokenizer).prompt_ids
    if options.model is None:
        model = random_model(vocab_size, tokenizer.eos_token_id, options.mean_length)
    else:
        model = open_exported(options.model, ModelSettings(), vocab_size, torch.device("cpu"))
    return Work(model, prompts, end_tokens(model, tokenizer), vocab_size, pad_id(tokenizer, vocab_size))


@torch.no_grad()
def plain(work: Work, new_tokens: int, seeds: Sequence[int], do_sample: bool = True) -> list[list[list[int]]]:
    """Return the answers of a ``model.generate`` loop, without EOS, for each seed."""
    found: list[list[list[int]]] = []
    for seed in seeds:
        torch.manual_seed(seed)
        answers: list[list[int]] = []
        for start in range(0, len(work.prompts), BATCH):
            batch = work.prompts[start : start + BATCH]
            width = max(map(len, batch))
            pads = [width - len(prompt) for prompt in batch]
            ids = torch.tensor([[work.pad] * n + prompt for n, prompt in zip(pads, batch, strict=True)])
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in pads])
            output = work.model.generate(
                ids, attention_mask=mask, do_sample=do_sample, max_new_tokens=min(new_tokens, POSITIONS - width),
                pad_token_id=work.pad, eos_token_id=sorted(work.eos_ids), **({"top_k": 0} if do_sample else {}),
            )  # fmt: skip
            answers += [_without_eos(row, work.eos_ids) for row in output[:, width:].tolist()]
        found.append(answers)
    return found


def _without_eos(tokens: list[int], eos_ids: frozenset[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in eos_ids), len(tokens))]


def ours(work: Work, new_tokens: int, seeds: Sequence[int], do_sample: bool = True) -> list[list[list[int]]]:
    """Return deltakd's answers for each seed."""
    return generate(
        work.model,
        work.prompts,
        range(len(work.prompts)),
        decoding=Decoding(do_sample=do_sample, max_new_tokens=new_tokens),
        seeds=seeds,
        batch_size=BATCH,
        eos_ids=work.eos_ids,
        vocab_size=work.vocab_size,
        pad_id=work.pad,
    )


def kept(work: Work, answers: list[list[list[int]]], new_tokens: int) -> int:
    """Count the tokens of all answers, with the EOS of those that have one."""
    return sum(min(len(tokens) + 1, new_tokens) for of_seed in answers for tokens in of_seed)


def compare_greedy(work: Work, new_tokens: int) -> tuple[int, int]:
    """Return the number of equal answers, and of all answers.

    A batch of the plain loop ends when its longest row reaches the last position; answers are compared up to there.
    """
    pairs = list(
        zip(ours(work, new_tokens, [0], False)[0], plain(work, new_tokens, [0], do_sample=False)[0], strict=True)
    )
    room = [
        min(new_tokens, POSITIONS - max(map(len, work.prompts[start : start + BATCH])))
        for start in range(0, len(pairs), BATCH)
    ]
    return sum(a[: room[i // BATCH]] == b for i, (a, b) in enumerate(pairs)), len(pairs)


def measure(work: Work, new_tokens: int, rounds: int) -> Table:
    """Measure both ways in turn."""
    ways: dict[str, Callable[..., list[list[list[int]]]]] = {"plain": plain, "ours": ours}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, int] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            started, used = time.perf_counter(), time.process_time()
            answers = way(work, new_tokens, SEEDS)
            seconds, busy = time.perf_counter() - started, time.process_time() - used
            tokens[name] = kept(work, answers, new_tokens)
            wall[name].append(tokens[name] / seconds)
            cpu[name].append(tokens[name] / busy)
    table = Table(title=f"{len(work.prompts)} prompts x {len(SEEDS)} seeds, at most {new_tokens} new tokens")
    for column in ("way", "tokens", "tokens/s, best", "all rounds", "tokens per CPU second, best", "all rounds"):
        table.add_column(column)
    for name in ways:
        cells = [(f"{max(speeds):.0f}", " ".join(f"{s:.0f}" for s in speeds)) for speeds in (wall[name], cpu[name])]
        table.add_row(name, str(tokens[name]), *cells[0], *cells[1])
    table.add_row("ours / plain", "", *(
        cell
        for speeds in (wall, cpu)
        for cell in (
            f"{max(speeds['ours']) / max(speeds['plain']):.2f}",
            " ".join(f"{a / b:.2f}" for a, b in zip(speeds["ours"], speeds["plain"], strict=True)),
        )
    ))  # fmt: skip
    return table


def main() -> None:
    """Read the command line, compare, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="of random weights; a model has its own")
    parser.add_argument("--prompts", type=Path, default=Path(PROMPTS))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--mean-length", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    console = Console(width=140)
    work = load(options)
    lengths = sorted(map(len, work.prompts))
    console.print(
        f"{torch.get_num_threads()} threads; V = {work.vocab_size}; prompts of {lengths[0]} to {lengths[-1]} tokens, "
        f"{sum(lengths) / len(lengths):.0f} on average"
    )
    for new_tokens in options.new_tokens:
        same, total = compare_greedy(work, new_tokens)
        console.print(f"greedy, at most {new_tokens} new tokens: {same} of {total} answers are those of model.generate")
        console.print(measure(work, new_tokens, options.rounds))


if __name__ == "__main__":
    main()
