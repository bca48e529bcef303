"""The map between the vocabularies of two tokenizers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltakd.data.encoding.token_texts import TokenTexts, UnalignableError
from deltakd.types import TokenMap

_NONE = -1


def make_token_map(
    student: TokenTexts, other: TokenTexts, sizes: tuple[int, int], ends: tuple[int, int], names: tuple[str, str]
) -> TokenMap:
    """Match the tokens of two vocabularies by their bytes, and the tokens that end an answer with each other.

    Args:
        student, other: the texts of their tokens.
        sizes: V of the student, and of the teachers.
        ends: the token with which each side's template ends an answer.
        names: of both tokenizers, for the message.

    Raises:
        UnalignableError: they share no token of more than one byte.
    """
    ids = [_by_text(texts, size) for texts, size in zip((student, other), sizes, strict=True)]
    both = ids[0].keys() & ids[1].keys()
    if not any(len(text) > 1 for text in both):
        raise UnalignableError(
            f"the tokenizers {names[0]} (student) and {names[1]} (teachers) share no token of more than one byte, so "
            "there is nothing to align; give models whose vocabularies overlap"
        )
    pairs = torch.tensor(sorted([*((ids[0][text], ids[1][text]) for text in both), ends]), dtype=torch.int64)
    return TokenMap(
        student_shared=pairs[:, 0].contiguous(),
        other_shared=pairs[:, 1].contiguous(),
        student_of_other=_beginnings(other, sizes[1], ids[0], dict.fromkeys(other.ends, ends[0])),
        other_of_student=_beginnings(student, sizes[0], ids[1], dict.fromkeys(student.ends, ends[1])),
    )


def _by_text(texts: TokenTexts, size: int) -> dict[str, int]:
    """Return text -> id; of several tokens with one text, not the byte of a byte fallback, and the lowest id."""
    found: dict[str, tuple[bool, int]] = {}
    for token, text, is_fallback in texts.vocabulary():
        if token < size and (text not in found or (is_fallback, token) < found[text]):
            found[text] = is_fallback, token
    return {text: token for text, (_, token) in found.items()}


def _beginnings(texts: TokenTexts, size: int, there: Mapping[str, int], ends: Mapping[int, int]) -> Tensor:
    """Return [V], the token of the other vocabulary that each token's text is, or else begins with."""
    found = torch.full((size,), _NONE, dtype=torch.int64)
    for token, text, _ in texts.vocabulary():
        if token < size:
            prefixes = (text[:stop] for stop in range(len(text), 0, -1))
            found[token] = next((there[prefix] for prefix in prefixes if prefix in there), _NONE)
    for token, end in ends.items():
        if token < size:
            found[token] = end
    return found
