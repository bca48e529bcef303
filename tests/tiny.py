"""A tiny world for tests of whole runs: models, tokenizer and rows made on the spot."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from deltakd.models import train_tokenizer

WORDS = ("red", "blue", "green", "cat", "dog", "bird", "sun", "moon", "star")


def make_rows(n: int, seed: int) -> list[dict[str, str]]:
    """Rows whose answers vary in length, so that averages over rows and over tokens differ."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        words = draw.choices(WORDS, k=draw.randint(1, 6))
        rows.append({"instruction": f"Repeat {len(words)}", "context": " ".join(words), "response": " ".join(words)})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([json.dumps(row) for row in make_rows(50, 0)], 300)


def save_model(directory: Path, *, seed: int, width: int = 16, family: str = "gpt2", **options: Any) -> Path:
    """A random model with its tokenizer, as a Hugging Face directory."""
    tokenizer = options.pop("tokenizer", None) or make_tokenizer()
    sizes = {
        "gpt2": {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 128},
        "opt": {
            "hidden_size": width,
            "ffn_dim": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": width,
            "pad_token_id": 1,
        },
    }
    rope = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "max_position_embeddings": 128,
        "pad_token_id": None,
    }
    special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vocabulary = options.pop("vocab_size", len(tokenizer))
    config = AutoConfig.for_model(family, vocab_size=vocabulary, **special, **(sizes.get(family, rope) | options))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_foreign_teachers(root: Path, spreads: tuple[float, float] = (0.02, 0.02)) -> tuple[str, ...]:
    """Teacher and raw teacher with a tokenizer of their own, whose EOS has another name; returns their overrides.

    Args:
        root: where they go.
        spreads: standard deviations of their weights.
    """
    tokenizer = train_tokenizer((row["instruction"] for row in make_rows(60, 9)), 330, add_prefix_space=True)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    names = ("teacher", "teacher_raw")
    for seed, name, spread in zip((20, 21), names, spreads, strict=True):
        save_model(root / name, seed=seed, width=24, tokenizer=tokenizer, initializer_range=spread)
    return tuple(f"model.{name}.path={root / name}" for name in names)


@dataclass(frozen=True)
class World:
    """Paths of a tiny world."""

    root: Path

    def overrides(self, run_dir: Path, loss: str = "delta_kd", *extra: str) -> list[str]:
        """A run of a few seconds; later overrides win."""
        base = [
            f"loss={loss}",
            f"model.student.path={self.root / 'student_raw'}",
            f"model.teacher.path={self.root / 'teacher'}",
            f"model.teacher_raw.path={self.root / 'teacher_raw'}",
            f"data.train={self.root / 'train.jsonl'}",
            f"data.val={self.root / 'val.jsonl'}",
            f"data.cache_dir={self.root / 'cache'}",
            "data.max_length=120",
            "data.max_prompt_length=90",
            "data.batch_size=4",
            "data.template={with_input:'{instruction}: {input}>',without_input:'{instruction}>',tail:'>'}",
            "trainer.max_steps=6",
            "trainer.max_epochs=null",
            "trainer.log_every_n_steps=1",
            "trainer.enable_progress_bar=false",
            "optim.lr=0.01",
            "logger=csv",
            "evaluation=none",
            # Rows of a few words are bound to occur twice.
            "evaluation.allow_overlap=true",
            "evaluation.decoding.max_new_tokens=8",
            "evaluation.measures.rows=0",
            f"run_dir={run_dir}",
        ]
        by_key = {override.split("=", 1)[0]: override for override in [*base, *extra]}
        return list(by_key.values())


def make_world(root: Path) -> World:
    save_model(root / "student_raw", seed=1)
    save_model(root / "teacher_raw", seed=2, width=24)
    save_model(root / "teacher", seed=3, width=24)
    write_rows(root / "train.jsonl", make_rows(40, 1))
    write_rows(root / "val.jsonl", make_rows(8, 2))
    write_rows(root / "test.jsonl", make_rows(6, 3))
    return World(root)
