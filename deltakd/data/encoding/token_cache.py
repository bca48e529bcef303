"""Fingerprints: cached tables of tokens are looked up by a hash of everything they depend on."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Increase it when a change gives the same inputs different tokens, or refuses them, or gives the table other columns.
FORMAT_VERSION = 3


def fingerprint(*parts: Any) -> str:
    """Return the sha256 (64 hex digits) of JSON-able parts and the format version."""
    digest = hashlib.sha256(str(FORMAT_VERSION).encode())
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of everything that affects how the tokenizer turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    # Left over from the tokenizer's last call; our calls set neither.
    state = {key: value for key, value in state.items() if backend is None or key not in ("truncation", "padding")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return fingerprint(type(tokenizer).__name__ if backend is None else "", state, special)
