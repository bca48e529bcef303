"""Aligns two tokenisations of one answer by its bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import accumulate, pairwise

from deltakd.types import UNALIGNED

#: Pieces in which texts that differ are compared: a token without bytes, a word, white space, a UTF-8 character.
_PIECES = re.compile(r"[\u0100-\uffff]|[A-Za-z0-9]+|[ \t\r\n]+|[\xc0-\xff][\x80-\xbf]*|[\x00-\xff]")

#: Most pairs of pieces that are all compared, which takes a fifth of a second.
_COMPARED = 4_000_000
#: Pieces of longer texts that are compared at once.
_WINDOW = 500


def align(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the span of each token of both sides, numbered from 0 in the order of the text.

    A span is a shortest stretch that starts and ends at a token border on both sides. Where the texts differ (a
    template trims white space, a tokenizer normalises, a side was cut), tokens are UNALIGNED, and so is every token
    that reaches into such a part.

    Args:
        ours, theirs: the text of each token (``TokenTexts.of``).
    """
    sides = (ours, theirs)
    borders = [[0, *accumulate(map(len, tokens))] for tokens in sides]
    # A token without text joins the span before it; at the beginning, the one after it.
    token_at = [{border: token for token, border in enumerate(of)} | {0: 0} for of in borders]
    spans: tuple[list[int], list[int]] = ([UNALIGNED] * len(ours), [UNALIGNED] * len(theirs))
    count = 0
    for starts in common("".join(ours), "".join(theirs)):
        *begin, length = starts
        inside = [
            {border - at for border in of if at <= border <= at + length} for of, at in zip(borders, begin, strict=True)
        ]
        shared = sorted(inside[0] & inside[1])
        for start, stop in pairwise(shared):
            for of, found, at in zip(token_at, spans, begin, strict=True):
                for token in range(of[at + start], of[at + stop]):
                    found[token] = count
            count += 1
    return spans


def common(ours: str, theirs: str) -> Iterator[tuple[int, int, int]]:
    """Yield the stretches that both texts have, in order: where each begins in both, and its length.

    Equal texts are one stretch. Others are compared piece by piece between their common beginning and end.
    """
    front = len(ours) if ours == theirs else _shared_length(ours, theirs)
    if front:
        yield 0, 0, front
    ours, theirs = ours[front:], theirs[front:]
    if not ours or not theirs:
        return
    back = _shared_length(ours[::-1], theirs[::-1])
    middle = [text[: len(text) - back] for text in (ours, theirs)]
    pieces: list[list[str]] = [_PIECES.findall(text) for text in middle]
    at = [[0, *accumulate(map(len, of))] for of in pieces]
    for a, b, size in _matching(*pieces):
        yield front + at[0][a], front + at[1][b], at[0][a + size] - at[0][a]
    if back:
        yield front + len(middle[0]), front + len(middle[1]), back


def _matching(ours: Sequence[str], theirs: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Yield (start in ours, start in theirs, length) of equal pieces, in order.

    Comparing all pieces takes quadratic time, so long texts are compared window by window. A difference longer than a
    window may leave the text after it unmatched.
    """
    size = max(len(ours), len(theirs)) if len(ours) * len(theirs) <= _COMPARED else _WINDOW
    a = b = 0
    while a < len(ours) and b < len(theirs):
        window = ours[a : a + size], theirs[b : b + size]
        ends_here = a + size >= len(ours) and b + size >= len(theirs)
        # Near the end of a window, pieces may match by chance whose partners lie beyond it.
        settled = size if ends_here else size * 3 // 4
        stop = (settled, settled)
        for x, y, length in SequenceMatcher(None, *window, autojunk=False).get_matching_blocks():
            if length and max(x, y) < settled:
                yield a + x, b + y, length
                stop = x + length, y + length
        a, b = a + stop[0], b + stop[1]


def _shared_length(ours: str, theirs: str) -> int:
    """Return the length of the longest common beginning."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def from_first_letter(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return both sides' tokens without the white space before the answer, if they do not begin with the same.

    A template may write or trim it, and SentencePiece a dummy prefix: it is no part of the answer's text.
    """
    sides = (list(ours), list(theirs))
    texts = ["".join(side) for side in sides]
    blanks = [len(text) - len(text.lstrip(" \t\r\n")) for text in texts]
    if texts[0][: blanks[0]] == texts[1][: blanks[1]]:
        return sides
    for side, blank in zip(sides, blanks, strict=True):
        for place, token in enumerate(side):
            side[place] = token[blank:]
            blank -= min(blank, len(token))
            if not blank:
                break
    return sides
