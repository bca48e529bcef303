"""Random models and rows of real shapes, made on the device: what a step costs does not depend on the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltakd.data.batches.loader import collate
from deltakd.data.encoding.encoded_set import EncodedSet
from deltakd.models import LanguageModel
from deltakd.references import CachedReferences, CacheStore, LiveReferences
from deltakd.references.begin import token_tensors
from deltakd.references.index import keys_of_set
from deltakd.references.store import OFFSETS, ROW_KEYS


@dataclass(frozen=True)
class Shape:
    """A family, and its options for student and teachers."""

    family: str
    vocabulary: int
    student: dict[str, Any]
    teacher: dict[str, Any]


def _qwen(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "intermediate_size": inner,
        "tie_word_embeddings": True,
    }


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"n_embd": width, "n_layer": layers, "n_head": heads}


SHAPES = {
    "gpt2": Shape("gpt2", 50_257, _gpt2(768, 12, 12), _gpt2(1600, 48, 25)),
    "qwen": Shape("qwen2", 151_936, _qwen(896, 24, 14, 4864), _qwen(1536, 28, 12, 8960)),
    "tiny_gpt2": Shape("gpt2", 512, _gpt2(32, 2, 2), _gpt2(48, 2, 2)),
    "tiny_qwen": Shape("qwen2", 512, _qwen(32, 2, 4, 64), _qwen(64, 2, 4, 96)),
}


def make_model(shape: Shape, role: str, device: str, dtype: torch.dtype, length: int) -> LanguageModel:
    """Return a random model of a role."""
    sizes = shape.student if role.startswith("student") else shape.teacher
    positions = "n_positions" if shape.family == "gpt2" else "max_position_embeddings"
    config = AutoConfig.for_model(
        shape.family, vocab_size=shape.vocabulary, bos_token_id=0, eos_token_id=0, **sizes, **{positions: length}
    )
    config.pad_token_id = None
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LanguageModel(model.to(device), shape.vocabulary)


def make_rows(rows: int, length: int, vocabulary: int) -> EncodedSet:
    """Return rows of equal length, trained on in all but their first eighth."""
    ids = np.random.default_rng(0).integers(1, vocabulary, (rows, length), dtype=np.int32)
    labels = ids.copy()
    labels[:, : length // 8] = -100
    offsets = np.arange(0, rows * length + 1, length, dtype=np.int64)
    return EncodedSet(ids.ravel(), labels.ravel(), offsets, np.arange(rows, dtype=np.int64))


def make_cache(folder: Path, references: LiveReferences, rows: EncodedSet, batch: int, device: str) -> CachedReferences:
    """Run references over the rows once, and return them as they are read from disk."""
    parts: list[dict[str, torch.Tensor]] = []
    content: dict[str, Any] = {"store": "hidden", "k": None, "temperature": None, "models": {}}
    store: CacheStore | None = None
    for start in range(0, len(rows), batch):
        some = [rows[row] for row in range(start, min(start + batch, len(rows)))]
        of = collate(some, 0, 0, 1).to(device)
        heads = references(of)
        if store is None:
            for role, head in heads.items():
                stored = str(head.hidden.dtype).removeprefix("torch.")
                content["models"][role] = {"stored_dtype": stored, "softcap": head.softcap, "scale": head.scale}
            content["vocabulary"] = len(next(iter(heads.values())).weight)
            store = CacheStore.create(folder, content, [])
            store.set_heads({f"{role}.weight": head.weight.detach().cpu().clone() for role, head in heads.items()})
        parts.append(token_tensors(heads, of.labels_N, content))
    assert store is not None
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    joined[ROW_KEYS] = torch.from_numpy(keys_of_set(rows).copy())
    joined[OFFSETS] = torch.from_numpy(np.concatenate([[0], np.cumsum(rows.valid_tokens)]))
    store.add_shard(joined)
    return CachedReferences(store, list(content["models"]))
