"""Small tokenizers of each kind, made on the spot: what they merge is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?#<>|_/()'\"{}[]-+=*\n\té的"
#: Byte-fallback pieces, as in Llama 2's vocabulary.
BYTES = tuple(f"<0x{number:02X}>" for number in range(256))


def wrap(backend: Tokenizer, special: Sequence[str] = SPECIAL, bos: bool = True, **kwargs: Any) -> Any:
    """A Hugging Face tokenizer around a backend, with BOS before each text if asked."""
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def byte_level(merges: Sequence[tuple[str, str]] = (), split: str | None = None, **kwargs: Any) -> Any:
    """Byte-level BPE: GPT-2's splits, or those of a pattern (Llama 3, Qwen)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, list(merges)))
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        from tokenizers import Regex

        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    return wrap(backend, **kwargs)


#: How Llama 3, Qwen and GPT-4 split a text.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def sentencepiece(kind: str = "metaspace", merges: Sequence[tuple[str, str]] = (), **kwargs: Any) -> Any:
    """Llama-2-like BPE with a dummy prefix and byte fallback; ``kind`` says how the prefix is written.

    ``metaspace``: at the beginning of a text alone (``legacy=False``); ``prepend``: after special tokens, too.
    """
    pieces = [*SPECIAL, *BYTES, "▁", *LETTERS.replace("\n", ""), *("".join(pair) for pair in merges)]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(backend, **kwargs)


def unigram(pieces: Sequence[tuple[str, float]] = (), byte_fallback: bool = True, **kwargs: Any) -> Any:
    """SentencePiece unigram, as T5's and Gemma's older kin; its control tokens are pieces of the model."""
    scored = [(piece, 0.0) for piece in SPECIAL]
    scored += [(piece, -20.0) for piece in BYTES] if byte_fallback else []
    scored += [(letter, -9.0) for letter in ("▁", *LETTERS)] + list(pieces)
    backend = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "first")])
    return wrap(backend, **kwargs)


def wordpiece(words: Sequence[str] = (), **kwargs: Any) -> Any:
    """BERT-like: a word that continues begins with ##."""
    pieces = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *words]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return wrap(backend, **kwargs)
