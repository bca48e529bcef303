"""Random GPT-2 checkpoints and Dolly prompts that all contestants share."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

#: Role -> layers, width, heads.
SIZES = {
    "small": {"student": (2, 128, 2), "teacher": (6, 384, 6), "teacher_raw": (6, 384, 6)},
    "gpt2": {"student": (12, 768, 12), "teacher": (48, 1600, 25), "teacher_raw": (48, 1600, 25)},
}

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


def make_models(folder: Path, tokenizer: PreTrainedTokenizerBase, sizes: dict[str, tuple[int, int, int]]) -> None:
    """Make one directory per role, with layers, width and heads from ``sizes``; existing ones are kept.

    Without dropout: TRL's trainers switch it off by different defaults.
    """
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    for seed, (role, (layers, width, heads)) in enumerate(sizes.items()):
        if (folder / role / "config.json").is_file():
            continue
        config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=len(tokenizer), **off)
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


def make_prompts(
    source: Path, target: Path, tokenizer: PreTrainedTokenizerBase, longest: int, number: int
) -> list[int]:
    """Write the first ``number`` Dolly prompts of at most ``longest`` tokens; return their lengths in tokens."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [PROMPT.format(row["instruction"].strip()) for row in rows if not row["context"]]
    lengths = [len(tokenizer(text).input_ids) for text in texts]
    chosen = [place for place, length in enumerate(lengths) if length <= longest][:number]
    if len(chosen) < number:
        raise SystemExit(f"{source} has {len(chosen)} prompts of at most {longest} tokens, and {number} are needed")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps({"prompt": texts[place]}) + "\n" for place in chosen), encoding="utf-8")
    return [lengths[place] for place in chosen]


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of all models."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return tokenizer
