"""Random GPT-2 checkpoints and Dolly rows that all contestants share."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

#: Role -> layers, width, heads.
SIZES = {
    "small": {"student": (2, 128, 2), "teacher": (6, 384, 6), "teacher_raw": (6, 384, 6)},
    "gpt2": {"student": (12, 768, 12), "teacher": (48, 1600, 25), "teacher_raw": (48, 1600, 25)},
}


def make_models(folder: Path, tokenizer_path: Path, sizes: dict[str, tuple[int, int, int]]) -> None:
    """Make one directory per role, with layers, width and heads from ``sizes``; existing ones are kept."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    for seed, (role, (layers, width, heads)) in enumerate(sizes.items()):
        if (folder / role / "config.json").is_file():
            continue
        config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=len(tokenizer))
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


def make_rows(source: Path, target: Path, most_words: int, number: int) -> None:
    """Write the first ``number`` Dolly rows with fewer than ``most_words`` words (instruction, context, response)."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    short = [r for r in rows if len(f"{r['instruction']} {r['context']} {r['response']}".split()) < most_words]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in short[:number]), encoding="utf-8")
