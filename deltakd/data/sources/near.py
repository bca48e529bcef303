"""Near duplicates between two sets of texts, found through their rare shingles, in time linear in the texts.

Two texts are near duplicates by the criterion of Lee et al. (arXiv 2107.06499) for training sets: their 5-grams of
words (Broder's shingles, 1997) have a Jaccard similarity of 0.8 or more. In addition, they must contain the same
numbers, and their similarity must not come from a frame only: a prompt's fixed text, or one instruction with many
inputs. A shingle that many different texts have (``common``) belongs to a frame; if half of a text's shingles or more
do, the remaining ones must be equally similar.

One of the sets is small. Of the other, only hashes of its shingles are kept, on disk. A text of the large set is
discarded first if fewer than four fifths of its shingles occur in the small set: it can't be near any text there. For
the rest the search is exact, by prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007): order every text's
shingles from the rarest to the most common. Texts with a similarity of t or more share one of their first
n - ceil(t n) + 1 shingles, so only these are looked up. By the rule of frames none of them is common, so each leads to
a bounded number of texts.

Texts and shingles are identified by 64 bits, so among ten million the total probability of a collision is 1e-5.
"""

from __future__ import annotations

import re
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

#: Words per shingle.
SHINGLE = 5
#: Minimum Jaccard similarity of near duplicates.
NEAR = 0.8
#: A shingle in more than this share of the texts belongs to a frame, within the bounds of the next line.
COMMON_SHARE = 0.01
LEAST_COMMON, MOST_COMMON = 5, 100

#: Number of texts hashed at once, and of shingles read back at once.
_TEXTS, _SHINGLES = 1_000, 1 << 21

Words = tuple[str, ...]

#: Scripts that write no spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
#: A word; where a script has no spaces, a character.
_WORD = re.compile(rf"[^\W{_SPACELESS}]+|[{_SPACELESS}]")
#: Wikipedia's reference marks, which some releases of a data set have and others lack.
_MARK = re.compile(r"\[\d+\]")


def words_of(text: str) -> Words:
    """Return the words of a text, case folded, without punctuation and reference marks."""
    return tuple(_WORD.findall(_MARK.sub(" ", text.casefold())))


def common(texts: int) -> int:
    """Return the number of different texts, out of ``count``, above which a shingle belongs to a frame."""
    return min(max(int(COMMON_SHARE * texts), LEAST_COMMON), MOST_COMMON)


class Near(NamedTuple):
    """Near duplicates by text number; texts with the same words share a number.

    Args:
        numbers: [texts] number of each text, at the position that ``add`` returned.
        found: number of one of the many -> numbers of those of the few near it, with their similarity; 1.0 for itself.
    """

    numbers: NDArray[np.int64]
    found: dict[int, dict[int, float]]


@final
class Corpus:
    """A set of different texts, kept only as hashes."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._words: list[int] = []
        self._numerals: list[int] = []
        self._sizes: list[NDArray[np.int64]] = []
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._spool.close)
        self._factors = np.random.Generator(np.random.PCG64(0)).integers(0, 2**63, SHINGLE, np.uint64) * 2 + 1

    def add(self, texts: Iterable[str]) -> NDArray[np.int64]:
        """Return [texts], a position for each; equal texts get the same one."""
        places = [np.empty(0, np.int64)]
        waiting = iter(texts)
        while batch := list(islice(waiting, _TEXTS)):
            before = len(self._places)
            new: list[str] = []
            for text in batch:
                if self._places.setdefault(hash(text), len(self._places)) == before + len(new):
                    new.append(text)
            self._spread([words_of(text) for text in new])
            places.append(np.fromiter((self._places[hash(text)] for text in batch), np.int64, len(batch)))
        return np.concatenate(places)

    def _spread(self, texts: list[Words]) -> None:
        """Keep the hashes of new texts."""
        self._words.extend(map(hash, texts))
        self._numerals.extend(hash(tuple(word for word in words if word.isdigit())) for words in texts)
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        flat = np.fromiter(map(hash, chain.from_iterable(texts)), np.int64, int(lengths.sum())).view(np.uint64)
        owners = np.repeat(np.arange(len(texts)), lengths)
        left_over = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))
        starts = np.flatnonzero(left_over >= SHINGLE)
        hashes = np.zeros(len(starts), np.uint64)
        for place, factor in enumerate(self._factors):
            # A separate factor for each position; products and sums wrap around.
            hashes += flat[starts + place] * factor
        owners = owners[starts]
        order = np.lexsort((hashes, owners))
        owners, hashes = owners[order], hashes[order]
        # A shingle counts once per text, however often it occurs.
        once = _first_of_its_kind(owners) | _first_of_its_kind(hashes)
        self._spool.write(hashes[once].data)
        self._sizes.append(np.bincount(owners[once], minlength=len(texts)))

    def near(self, few: NDArray[np.int64], many: NDArray[np.int64]) -> Near:
        """Find the near duplicates of the few among the many; texts with the same words are the nearest.

        Args:
            few, many: positions of texts; a text may be on both sides. Texts on neither are ignored.
        """
        _, first, same = np.unique(np.array(self._words, np.int64), return_index=True, return_inverse=True)
        numbers = first[same]
        left, right = _membership(numbers[few], len(numbers)), _membership(numbers[many], len(numbers))
        found: defaultdict[int, dict[int, float]] = defaultdict(dict)
        for number in np.flatnonzero(left & right).tolist():
            found[number][number] = 1.0
        sizes = np.concatenate([np.empty(0, np.int64), *self._sizes])
        different = (numbers == np.arange(len(numbers))) & (left | right)
        pool = self._pool(sizes, left, right & different)
        shingles = self._shingles(sizes, pool, different)
        for one, other in shingles.candidates(left[pool], right[pool]):
            a, b = int(pool[one]), int(pool[other])
            similarity = shingles.similarity(one, other) if self._numerals[a] == self._numerals[b] else None
            if similarity is None:
                continue
            for here, there in ((a, b), (b, a)):
                if left[here] and right[there]:
                    found[there][here] = similarity
        return Near(numbers, dict(found))

    def _pool(self, sizes: NDArray[np.int64], left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.int64]:
        """Return the numbers of the few, and of those among the many that may be near them."""
        known = np.empty(0, np.uint64)
        for _, hashes in self._pieces(sizes, left):
            known = _distinct(np.concatenate([known, hashes]))
        shared = np.zeros(len(sizes), np.int64)
        for owners, hashes in self._pieces(sizes, right):
            shared += np.bincount(owners[_places_of(hashes, known)[1]], minlength=len(sizes))
        # The small number guards 0.8 n that came out above a whole number.
        return np.flatnonzero(left | (right & (sizes > 0) & (shared >= NEAR * sizes - 1e-9)))

    def _shingles(self, sizes: NDArray[np.int64], pool: NDArray[np.int64], different: NDArray[np.bool_]) -> _Shingles:
        """Return the shingles of the pool, with the number of different texts that contain each."""
        parts = list(self._pieces(sizes, _membership(pool, len(sizes))))
        owners = np.concatenate([np.empty(0, np.int64), *(owners for owners, _ in parts)])
        hashes = np.concatenate([np.empty(0, np.uint64), *(hashes for _, hashes in parts)])
        kinds = _distinct(hashes)
        frequency = np.zeros(len(kinds), np.int64)
        for _, some in self._pieces(sizes, different):
            places, there = _places_of(some, kinds)
            frequency += np.bincount(places[there], minlength=len(kinds))
        most = common(int(different.sum()))
        return _Shingles(np.searchsorted(pool, owners), np.searchsorted(kinds, hashes), frequency, len(pool), most)

    def _pieces(
        self, sizes: NDArray[np.int64], chosen: NDArray[np.bool_]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """Yield text and hash of each shingle of the chosen texts, in order, in chunks."""
        ends = np.cumsum(sizes)
        if not len(ends) or not ends[-1] or not chosen.any():
            return
        self._spool.flush()
        spooled = np.memmap(self._spool, np.uint64, mode="r", shape=(int(ends[-1]),)).view(np.ndarray)
        first = 0
        while first < len(sizes):
            start = int(ends[first] - sizes[first])
            last = max(int(np.searchsorted(ends, start + _SHINGLES, "right")), first + 1)
            owners = np.repeat(np.arange(first, last), sizes[first:last])
            kept = chosen[owners]
            yield owners[kept], spooled[start : int(ends[last - 1])][kept]
            first = last


def _membership(numbers: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    member = np.zeros(size, np.bool_)
    member[numbers] = True
    return member


def _places_of(values: NDArray[np.uint64], ordered: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the position of each value in ``ordered``, and True if it is there."""
    if not len(ordered):
        return np.zeros(len(values), np.int64), np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return places, ordered[places] == values


class _Shingles:
    """Every text's shingles as numbers, the rarest first.

    Args:
        owners, kinds: [shingles] text, in order, and kind of each shingle; no text has one twice.
        frequency: [kinds] number of different texts that have a shingle of the kind, these and others.
        texts: number of texts.
        common: a kind found in more texts than this belongs to a frame.
    """

    def __init__(
        self,
        owners: NDArray[np.int64],
        kinds: NDArray[np.int64],
        frequency: NDArray[np.int64],
        texts: int,
        common: int,
    ) -> None:
        count = max(len(frequency), 1)
        ranks = np.empty(len(frequency), np.int64)
        ranks[np.argsort(frequency, kind="stable")] = np.arange(len(frequency))
        ordered = np.sort(owners * count + ranks[kinds])
        self._owners, self._ranks = ordered // count, ordered % count
        # Shingles ranked below this are rare.
        self._common = common
        self._rare = int((frequency <= common).sum())
        self._starts = np.searchsorted(self._owners, np.arange(texts + 1))
        sizes = np.diff(self._starts)
        rare = np.bincount(self._owners[self._ranks < self._rare], minlength=texts)
        self._framed = 2 * (sizes - rare) >= sizes
        self._deciding = np.where(self._framed, rare, sizes)

    def candidates(self, left: NDArray[np.bool_], right: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
        """Yield the pairs, one text from each side, that share a shingle which near duplicates must share."""
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


def _first_of_its_kind(ordered: NDArray[Any]) -> NDArray[np.bool_]:
    """True for each value that differs from the one before it."""
    return np.concatenate([np.ones(min(len(ordered), 1), np.bool_), ordered[1:] != ordered[:-1]])


def _distinct(values: NDArray[Any]) -> NDArray[Any]:
    """Return the different values in order; ``np.unique`` hashes them, which is slower."""
    ordered = np.sort(values)
    return ordered[_first_of_its_kind(ordered)]


def _jaccard(one: set[int], other: set[int]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if shared else 0.0
