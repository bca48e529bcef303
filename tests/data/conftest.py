"""Tokenizers of one token a byte, made on the spot, and writers of small files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Factory = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> Factory:
    """Builds a byte tokenizer; ``around`` is the post-processor's template, such as "<s> $A"."""

    def make(around: str | None = None, **kwargs: Any) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(SPECIAL))
        if around:
            special = [(token, vocab[token]) for token in ("<s>", "</s>")]
            backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | kwargs
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Factory) -> PreTrainedTokenizerFast:
    """Adds BOS, as Llama's does."""
    return make_tokenizer("<s> $A")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], str]:
    """Writes text, or records as JSON lines, and gives the path."""

    def write(name: str, content: Any) -> str:
        text = content if isinstance(content, str) else "".join(json.dumps(record) + "\n" for record in content)
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(tmp_path / name)

    return write
