"""Near duplicates among two sets of texts, found through their rare shingles, in time linear in the texts.

Two texts are near duplicates as Lee et al. (arXiv 2107.06499) tell them in training sets: their 5-grams of words
(Broder's shingles, 1997) have a Jaccard similarity of 0.8 or more. Beside that they must have the same numbers, and
they must not be alike because of a frame alone: a prompt's fixed text, or one instruction over many inputs. A shingle
of many different texts (``common``) belongs to a frame; where half of a text's shingles or more do, the others must be
as similar by themselves.

The search is exact, by prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007): let every text's shingles be
ordered from the rarest to the most common. Texts of a similarity t or more share one of their first
n - ceil(t n) + 1 shingles, so these alone are looked up. By the rule of frames none of them is common, so each leads to
a bounded number of texts.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Words of a shingle.
SHINGLE = 5
#: The least Jaccard similarity of near duplicates.
NEAR = 0.8
#: A shingle of more than this share of the texts belongs to a frame, within the bounds of the next line.
COMMON_SHARE = 0.01
LEAST_COMMON, MOST_COMMON = 5, 100

Words = tuple[str, ...]

#: Scripts that write no spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
#: A word; where a script has no spaces, a character.
_WORD = re.compile(rf"[^\W{_SPACELESS}]+|[{_SPACELESS}]")
#: Reference marks of Wikipedia, which one release of a data set has and another has not.
_MARK = re.compile(r"\[\d+\]")


def words_of(text: str) -> Words:
    """Return the words of a text, case folded, without punctuation and reference marks."""
    return tuple(map(sys.intern, _WORD.findall(_MARK.sub(" ", text.casefold()))))


def common(texts: int) -> int:
    """Return the number of different texts, out of so many, beyond which a shingle belongs to a frame."""
    return min(max(int(COMMON_SHARE * texts), LEAST_COMMON), MOST_COMMON)


class Texts:
    """Texts by number: those of the same words have the same number."""

    def __init__(self) -> None:
        self.words: list[Words] = []
        self._by_text: dict[str, int] = {}
        self._by_words: dict[Words, int] = {}

    def number(self, text: str) -> int:
        """Return the text's number, given at its first sight."""
        known = self._by_text.get(text)
        if known is None:
            words = words_of(text)
            known = self._by_text[text] = self._by_words.setdefault(words, len(self.words))
            if known == len(self.words):
                self.words.append(words)
        return known


def near_duplicates(
    texts: Sequence[Words], left: Collection[int], right: Collection[int]
) -> dict[int, dict[int, float]]:
    """Find the near duplicates among texts; the same words are the nearest.

    Args:
        texts: different texts, of which the common shingles are counted.
        left: numbers of the texts to find.
        right: numbers of the texts that they are found by; a text may be on both sides.

    Returns:
        number of a text of ``right`` -> numbers of those of ``left`` near it, with their similarity; 1.0 for itself.
    """
    found: defaultdict[int, dict[int, float]] = defaultdict(dict)
    for number in set(left) & set(right):
        found[number][number] = 1.0
    shingles = _Shingles(texts)
    in_left, in_right = _membership(left, len(texts)), _membership(right, len(texts))
    for a, b in shingles.candidates(in_left, in_right):
        similarity = shingles.similarity(a, b) if _numbers(texts[a]) == _numbers(texts[b]) else None
        if similarity is None:
            continue
        for one, other in ((a, b), (b, a)):
            if in_left[one] and in_right[other]:
                found[other][one] = similarity
    return dict(found)


def _membership(numbers: Collection[int], size: int) -> NDArray[np.bool_]:
    member = np.zeros(size, np.bool_)
    member[list(numbers)] = True
    return member


class _Shingles:
    """Every text's shingles as numbers, the rarest first.

    A shingle is known by 64 random bits, so two of them are taken for one with a probability of 1e-6 in all where there
    are ten million.
    """

    def __init__(self, texts: Sequence[Words]) -> None:
        owners, hashes = _hashed(texts)
        order = np.argsort(hashes)
        dense = np.empty(len(hashes), np.int64)
        dense[order] = np.cumsum(_first_of_its_kind(hashes[order])) - 1
        count = int(dense.max(initial=0)) + 1
        # A shingle counts once for a text, however often it stands there.
        once = _distinct(owners * count + dense)
        frequency = np.bincount(once % count, minlength=count)
        ranks = np.empty(count, np.int64)
        ranks[np.argsort(frequency, kind="stable")] = np.arange(count)
        ordered = np.sort(once // count * count + ranks[once % count])
        self._owners, self._ranks = ordered // count, ordered % count
        # Shingles of lower rank than this are rare.
        self._common = common(len(texts))
        self._rare = int((frequency <= self._common).sum())
        self._starts = np.searchsorted(self._owners, np.arange(len(texts) + 1))
        sizes = np.diff(self._starts)
        rare = np.bincount(self._owners[self._ranks < self._rare], minlength=len(texts))
        self._framed = 2 * (sizes - rare) >= sizes
        self._deciding = np.where(self._framed, rare, sizes)

    def candidates(self, left: NDArray[np.bool_], right: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
        """Yield the pairs, one of each side, that share a shingle which near duplicates must share."""
        # The small number guards ceil against 0.8 n that came out above a whole number.
        first = self._deciding - np.ceil(NEAR * self._deciding - 1e-9).astype(np.int64) + (self._deciding > 0)
        place = np.arange(len(self._owners)) - self._starts[self._owners]
        kept = place < first[self._owners]
        owners, ranks = self._owners[kept], self._ranks[kept]
        order = np.lexsort((owners, ranks))
        owners, ranks = owners[order], ranks[order]
        total = max(len(self._framed), 1)
        pairs = [np.empty(0, np.int64)]
        for step in range(1, self._common):
            same = ranks[step:] == ranks[:-step]
            if not same.any():
                break
            one, other = owners[:-step][same], owners[step:][same]
            across = (left[one] & right[other]) | (left[other] & right[one])
            pairs.append(one[across] * total + other[across])
        for pair in _distinct(np.concatenate(pairs)).tolist():
            yield divmod(pair, total)

    def similarity(self, a: int, b: int) -> float | None:
        """Return the similarity of two texts; None unless they are near."""
        one, other = self._of(a), self._of(b)
        whole = _jaccard(one, other)
        if whole < NEAR:
            return None
        if self._framed[a] or self._framed[b]:
            apart = _jaccard({s for s in one if s < self._rare}, {s for s in other if s < self._rare})
            return whole if apart >= NEAR else None
        return whole

    def _of(self, text: int) -> set[int]:
        return set(self._ranks[self._starts[text] : self._starts[text + 1]].tolist())


def _hashed(texts: Sequence[Words]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Text and hash of every shingle, in order, [shingles] each."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    numbers: dict[str, int] = {}
    flat = np.fromiter(
        (numbers.setdefault(word, len(numbers)) for words in texts for word in words), np.int64, int(lengths.sum())
    )
    bits = np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, (len(numbers), SHINGLE), np.uint64)
    owners = np.repeat(np.arange(len(texts)), lengths)
    left_over = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))
    starts = np.flatnonzero(left_over >= SHINGLE)
    hashes = np.zeros(len(starts), np.uint64)
    for place in range(SHINGLE):
        # Bits of its own for each word at each place; sums wrap around.
        hashes += bits[flat[starts + place], place]
    return owners[starts], hashes


def _first_of_its_kind(ordered: NDArray[Any]) -> NDArray[np.bool_]:
    """True for each value that differs from the one before it."""
    return np.concatenate([np.ones(min(len(ordered), 1), np.bool_), ordered[1:] != ordered[:-1]])


def _distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the different values in order; ``np.unique`` hashes them, which is slower."""
    ordered = np.sort(values)
    return ordered[_first_of_its_kind(ordered)]


def _jaccard(one: set[int], other: set[int]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if shared else 0.0


def _numbers(words: Words) -> list[str]:
    return [word for word in words if word.isdigit()]
