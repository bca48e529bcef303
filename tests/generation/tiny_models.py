"""Tiny models with random weights, and a tiny tokenizer, made on the spot."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 120
POSITIONS = 64
PAD, EOS = 0, 1
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "opt", "gemma2")

_ROPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
}


def make_model(family: str, vocab: int = VOCAB, **options: Any) -> PreTrainedModel:
    common = {"vocab_size": vocab, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD, **options}
    torch.manual_seed(7)
    model = {
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(**{"n_positions": POSITIONS, **common}, n_embd=32, n_layer=2, n_head=4)
        ),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**_ROPE, **common)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_ROPE, **common)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_ROPE, **common)),
        # A window shorter than the texts, so that the sliding cache is used for what it is.
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_ROPE, **common, sliding_window=6, query_pre_attn_scalar=8)),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
                max_position_embeddings=POSITIONS,
                **common,
            )
        ),
    }[family]()
    # Initial weights of 0.02 give nearly flat logits, where everything passes and rounding decides.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *sorted(string.printable)])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def make_prompts(count: int, shortest: int = 2, longest: int = 14) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]
