"""Plain text packed into blocks of equal length, for pre-training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deltakd.data.encoding.encoded_set import EncodedSet
from deltakd.data.encoding.token_cache import fingerprint, tokenizer_fingerprint
from deltakd.data.encoding.tokens import TextEncoder, eos_id
from deltakd.io.arrays import ArrayWriter, kept_arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Documents longer than this many blocks are split, so that one book cannot use up a whole token budget.
PIECE_BLOCKS = 20
#: English text has about four characters per token; only the size of the pieces depends on it.
CHARACTERS_PER_TOKEN = 4
SHUFFLE_SEED = 0
#: Pieces tokenised at once.
BATCH = 256


def pack_texts(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    cache_dir: str | Path | None = None,
    max_tokens: int | None = None,
) -> EncodedSet:
    """Join documents by EOS and cut them into blocks in which every token is trained.

    Args:
        texts: the documents.
        tokenizer: must have an EOS token.
        block_length: tokens per block; the last block may be shorter, down to 2 tokens.
        cache_dir: folder that keeps the tokens for later runs; None: they are only in a temporary place.
        max_tokens: token budget. With one, documents are first shuffled with a fixed seed, so that every source gets
            its share; long ones are split into pieces of about PIECE_BLOCKS blocks, each closed by EOS.

    Returns:
        Blocks with labels = ids and row ids 0, 1, ...; ``counts`` has ``rows`` (documents) and ``tokens``.

    Raises:
        ValueError: no EOS token, fewer than 2 tokens in all, or a limit below 2.
    """
    if block_length < 2:
        raise ValueError(f"block_length = {block_length}; a block needs at least 2 tokens to have one to predict")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens = {max_tokens}; give at least 2, or null for all")
    eos_id(tokenizer)
    documents = list(texts)
    digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in documents]
    key = fingerprint("text", digests, tokenizer_fingerprint(tokenizer), block_length, max_tokens)

    def build(writer: ArrayWriter) -> None:
        tokens = _tokens(documents, tokenizer, block_length, max_tokens)
        # A last block of one token would have nothing to predict.
        writer.append("input_ids", tokens[: len(tokens) - (len(tokens) % block_length == 1)])

    input_ids = kept_arrays(f"text-{key}", cache_dir, {"input_ids": "<i4"}, build, "tokens").arrays["input_ids"]
    offsets = np.append(np.arange(0, len(input_ids), block_length), len(input_ids))
    counts = {"rows": len(documents), "tokens": len(input_ids), "cut_prompts": 0, "cut_responses": 0, "dropped": 0}
    row_ids = np.arange(len(offsets) - 1, dtype=np.int64)
    return EncodedSet(input_ids, input_ids, offsets, row_ids, counts, key)


def _tokens(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_length: int, max_tokens: int | None
) -> NDArray[np.int32]:
    """Return all tokens, concatenated: [tokens] int32."""
    encoder = TextEncoder(tokenizer)
    pieces = [piece for document in documents for piece in pieces_of(document, block_length)]
    if max_tokens is not None:
        order = np.random.Generator(np.random.PCG64(SHUFFLE_SEED)).permutation(len(pieces))
        pieces = [(pieces[index][0], True) for index in order]
    parts: list[NDArray[np.int32]] = []
    total = 0
    for start in range(0, len(pieces), BATCH):
        batch = pieces[start : start + BATCH]
        for (_, last), ids in zip(batch, encoder.documents([text for text, _ in batch]), strict=True):
            parts.append(np.asarray(ids + [encoder.end] * last, dtype=np.int32))
            total += len(parts[-1])
        if max_tokens is not None and total >= max_tokens:
            break
    tokens = np.concatenate(parts or [np.empty(0, np.int32)])[:max_tokens]
    if len(tokens) < 2:
        raise ValueError(f"{len(documents)} document(s) with {len(tokens)} token(s): there is nothing to train on")
    return tokens


def pieces_of(document: str, block_length: int) -> Iterator[tuple[str, bool]]:
    """Yield (piece, True if it is the document's last), cut at line ends, or at spaces within a very long line."""
    start, size = 0, PIECE_BLOCKS * CHARACTERS_PER_TOKEN * block_length
    while len(document) - start > size:
        stop = start + size
        for mark in ("\n", " "):
            found = document.rfind(mark, start + 1, stop)
            if found > start + size // 2:
                stop = found
                break
        yield document[start:stop], False
        start = stop
    yield document[start:], True
