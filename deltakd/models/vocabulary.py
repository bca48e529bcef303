"""The vocabulary of a run: tokens that the tokenizer produces from data and that every model has a row for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from deltakd.data import EncodedSet
from deltakd.io.wording import listed

log = logging.getLogger(__name__)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, config: Any = None, role: str = "student") -> int:
    """Return V: the highest id plus 1 (``len(tokenizer)`` is wrong when ids have gaps), cut to the rows of a head.

    A special token beyond the head, such as Gemma 3's image token in its text models, is cut: text is encoded with
    special tokens split, so that only a template could write it, and ``unknown_token_problems`` finds that.

    Args:
        tokenizer: the model's.
        config: the model's transformers config; None: nothing is cut.
        role: for the messages.

    Raises:
        ValueError: the head lacks rows for tokens that data can hold, or for BOS, EOS or UNK.
    """
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    rows = None if config is None else head_rows(config)
    if rows is None or rows >= vocabulary:
        return vocabulary
    beyond = {i: token for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if i >= rows}
    needed = [token for i, token in beyond.items() if not is_unwritten(tokenizer, i)]
    if needed:
        raise ValueError(
            f"the tokenizer has {vocabulary} tokens but the model's output embedding has {rows} rows ({role}), none "
            f"for {listed(needed)}; give the tokenizer that belongs to the model"
        )
    log.info(
        "The tokenizer's special tokens %s are cut: the %s has no row for them, and no text is encoded as one.",
        listed(beyond.values()),
        role,
    )
    return rows


def head_rows(config: Any) -> int | None:
    """Return the number of output embedding rows from a transformers config, or None if it doesn't say."""
    rows = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return rows if isinstance(rows, int) and rows > 0 else None


def is_unwritten(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Return True if text is never encoded as this token: padding, or a special token other than BOS, EOS and UNK."""
    if token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        return False
    added = tokenizer.added_tokens_decoder.get(token_id)
    return token_id == tokenizer.pad_token_id or (added is not None and added.special)


def unknown_token_problems(
    name: str, encoded: EncodedSet, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> list[str]:
    """Return a sentence if rows hold tokens beyond the models' vocabulary.

    Args:
        name: of the set, for the message.
        encoded: the set.
        tokenizer: the tokenizer it was encoded with.
        vocabulary: V, tokens that all models share.
    """
    if vocabulary >= vocabulary_of(tokenizer) or not len(encoded.input_ids):
        return []
    at = np.flatnonzero(encoded.input_ids >= vocabulary)
    if not len(at):
        return []
    rows = np.unique(np.searchsorted(encoded.offsets, at, side="right") - 1)
    return [_unknown(name, encoded.row_ids[rows].tolist(), encoded.input_ids[at], tokenizer, vocabulary)]


def unaligned_problems(
    name: str, encoded: EncodedSet, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> list[str]:
    """Return a sentence if no token of a set's answers is aligned between two tokenizers.

    Args:
        name: of the set, for the message.
        encoded: the set, in both.
        tokenizer, other: of the student and the teachers.
    """
    if encoded.aligned_fraction != 0.0:
        return []
    names = [one.name_or_path or type(one).__name__ for one in (tokenizer, other)]
    return [
        f"{name}: no token of its answers could be aligned between the tokenizers {names[0]} (student) and {names[1]} "
        "(teachers): they write other bytes for the same text; give models of one family, or another "
        "data.teacher_template if theirs changes the answers"
    ]


def unknown_prompt_problems(
    name: str,
    prompts: Sequence[Sequence[int]],
    row_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int | None,
) -> list[str]:
    """As ``unknown_token_problems``, for prompts to answer; if the vocabulary is None (unknown), report nothing."""
    if vocabulary is None:
        return []
    found = {row: ids for row, ids in zip(row_ids, prompts, strict=True) if max(ids, default=0) >= vocabulary}
    if not found:
        return []
    beyond = np.array([i for ids in found.values() for i in ids if i >= vocabulary])
    return [_unknown(name, list(found), beyond, tokenizer, vocabulary)]


def _unknown(
    name: str, rows: Sequence[int], beyond: NDArray[Any], tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> str:
    tokens = [str(tokenizer.convert_ids_to_tokens(int(i))) for i in np.unique(beyond)]
    return (
        f"{name}: {len(rows)} rows ({listed(rows)}) hold {listed(tokens)}, which the models don't have (their "
        f"vocabulary ends at {vocabulary}); give a template without it (data.template), or take it out of the data"
    )
