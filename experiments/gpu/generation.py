"""Sampling: tokens per second with a growing key-value cache, and with a static one, each step a CUDA graph.

Random models, prompts of one length, answers that never end: ``batch`` rows at a time, twice as many in all, so that
rows join once. ``same`` is the share of tokens that both caches give; rounding may flip a near-tie in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, Results, peak_gib, wait
from worlds import SHAPES, make_model

from deltakd.generation import Decoding, generate
from deltakd.models import LanguageModel


def answers(
    model: LanguageModel, prompts: list[list[int]], static: bool, options: argparse.Namespace
) -> list[list[int]]:
    """Return the new tokens of each prompt."""
    return generate(
        model.hf,
        prompts,
        range(len(prompts)),
        decoding=Decoding(max_new_tokens=options.new_tokens),
        seeds=[1],
        batch_size=options.batch,
        eos_ids=frozenset(),
        vocab_size=model.vocabulary,
        pad_id=0,
        static_cache=static,
    )[0]


def measure(
    model: LanguageModel, prompts: list[list[int]], static: bool, options: argparse.Namespace, expected: list[list[int]]
) -> dict[str, Any]:
    """Time one form; ``expected`` is empty, or the tokens to compare with, and takes those of the first form."""
    found: list[list[int]] = []
    peak = peak_gib(lambda: found.extend(answers(model, prompts, static, options)))
    wait()
    began = time.perf_counter()
    answers(model, prompts, static, options)
    wait()
    seconds = time.perf_counter() - began
    if not expected:
        expected.extend(found)
    pairs = [(a, b) for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return {
        "tokens_per_second": len(pairs) / seconds,
        "ms_per_step": 1000 * seconds / (2 * options.new_tokens),
        "peak_gib": peak,
        "same": sum(a == b for a, b in pairs) / len(pairs),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["gpt2", "qwen"], choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    options = parser.parse_args()
    setting = {key: value for key, value in vars(options).items() if key != "out"}
    results = Results(options.out, "generation", setting)
    for name in options.shapes:
        shape = SHAPES[name]
        torch.manual_seed(0)
        length = options.prompt + options.new_tokens
        model = make_model(shape, "student", options.device, DTYPES[options.dtype], length)
        prompts = torch.randint(1, shape.vocabulary, (2 * options.batch, options.prompt)).tolist()
        expected: list[list[int]] = []
        for form, static in (("growing", False), ("static", True)):
            results.attempt(
                f"{name} {form}",
                lambda model=model, prompts=prompts, static=static, expected=expected: measure(
                    model, prompts, static, options, expected
                ),
            )
        del model


if __name__ == "__main__":
    main()
