"""Finds tasks of one set of rows in another, word for word or nearly: a test set that was trained on.

Near duplicates are defined as Lee et al. (arXiv 2107.06499) define them in training sets: the word 5-grams (Broder's
shingles, 1997) have a Jaccard similarity of 0.8 or more. The similarity is exact, counted through an inverted index of
one of the sets, not estimated by MinHash.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deltakd.data.sources.rows import Row

#: An instruction with more different inputs than this ("Summarise this text.") says nothing without its input.
GENERIC_INPUTS = 5
#: Words in a shingle.
SHINGLE = 5
#: Smallest Jaccard similarity of near duplicates.
NEAR = 0.8

_WORD = re.compile(r"\w+")
#: Wikipedia's reference marks, which are in some releases of a data set but not in others.
_MARK = re.compile(r"\[\d+\]")
#: The Alpaca frame around instruction and input, in files that hold whole prompts.
_FRAME = re.compile(r"### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:", re.DOTALL)

Words = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """A row whose task is in the other set, too.

    Args:
        row_id: the row's id.
        other_id: id of the most similar row of the other set.
        similarity: of their instructions; 1.0 for the same words.
        exact: True if instructions and inputs have the same words.
    """

    row_id: int
    other_id: int
    similarity: float
    exact: bool


def find_overlaps(asked: Sequence[Row], others: Iterable[Row]) -> list[Overlap]:
    """Return the rows of ``asked`` whose task occurs in ``others``, in their order, each with its most similar row.

    Words are compared after case folding, without punctuation and reference marks. Two tasks are the same if

    * their instructions have the same words, or the same numbers and a shingle similarity of at least NEAR (problems
      of one form differ only in their numbers; instructions shorter than SHINGLE words must be identical), and
    * their inputs have the same words, or the same numbers and a shingle similarity of at least NEAR, or one of them is
      empty: a question asked with and without a passage. A generic instruction (with more than GENERIC_INPUTS different
      inputs in both sets together) needs its input.

    Args:
        asked: an evaluation set; it is indexed.
        others: training rows.
    """
    others = list(others)
    index = _Index(asked, generic_instructions([*asked, *others]))
    best: dict[int, Overlap] = {}
    for row in others:
        for at, overlap in index.matches(row):
            if at not in best or (overlap.exact, overlap.similarity) > (best[at].exact, best[at].similarity):
                best[at] = overlap
    return [best[at] for at in sorted(best)]


def overlapping(rows: Sequence[Row], banned: Sequence[Row]) -> set[int]:
    """Return the positions of the ``rows`` whose task is among ``banned``, by the rules of ``find_overlaps``."""
    index = _Index(banned, generic_instructions([*rows, *banned]))
    return {at for at, row in enumerate(rows) if any(True for _ in index.matches(row))}


def normal_form(text: str) -> str:
    """Fold case and collapse white space."""
    return " ".join(text.casefold().split())


def generic_instructions(rows: Iterable[Row]) -> set[str]:
    """Return the instructions, in normal form, that occur with more than GENERIC_INPUTS different inputs."""
    inputs: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        instruction, given = task_texts(row)
        inputs[normal_form(instruction)].add(normal_form(given))
    return {instruction for instruction, texts in inputs.items() if len(texts) > GENERIC_INPUTS}


class _Index:
    """An index of rows by the words and by the shingles of their instructions."""

    def __init__(self, rows: Sequence[Row], generic: Iterable[str]) -> None:
        self._rows = rows
        self._generic = {_words(text) for text in generic}
        self._asked = [_words(task_texts(row)[0]) for row in rows]
        self._about = [_words(task_texts(row)[1]) for row in rows]
        self._sizes = [len(_shingles(words)) for words in self._asked]
        self._by_words: defaultdict[Words, list[int]] = defaultdict(list)
        self._by_shingle: defaultdict[Words, list[int]] = defaultdict(list)
        for at, words in enumerate(self._asked):
            self._by_words[words].append(at)
            for shingle in _shingles(words):
                self._by_shingle[shingle].append(at)

    def matches(self, row: Row) -> Iterable[tuple[int, Overlap]]:
        """Yield the position of each indexed row whose task ``row`` repeats, with the overlap."""
        instruction, given = task_texts(row)
        words = _words(instruction)
        similar = self._similar(words)
        if not similar:
            return
        about = _words(given)
        for at, similarity in similar.items():
            if self._same_input(at, words, about):
                exact = self._asked[at] == words and self._about[at] == about
                yield at, Overlap(self._rows[at].id, row.id, similarity, exact)

    def _similar(self, words: Words) -> dict[int, float]:
        found = dict.fromkeys(self._by_words.get(words, ()), 1.0)
        shingles = _shingles(words)
        shared = Counter(at for shingle in shingles for at in self._by_shingle.get(shingle, ()))
        for at, count in shared.items():
            similarity = count / (len(shingles) + self._sizes[at] - count)
            if at not in found and similarity >= NEAR and _numbers(words) == _numbers(self._asked[at]):
                found[at] = similarity
        return found

    def _same_input(self, at: int, asked: Words, about: Words) -> bool:
        other = self._about[at]
        if about == other:
            return True
        if not about or not other:
            return asked not in self._generic and self._asked[at] not in self._generic
        if _numbers(about) != _numbers(other):
            return False
        a, b = _shingles(about), _shingles(other)
        return len(a & b) >= NEAR * len(a | b) > 0


def task_texts(row: Row) -> tuple[str, str]:
    """Return instruction and input, taken out of Alpaca's frame if the row holds a whole prompt in it."""
    framed = None if row.prompt is None else _FRAME.search(row.prompt)
    return (framed[1], framed[2] or "") if framed else (row.question, row.input)


def _words(text: str) -> Words:
    return tuple(_WORD.findall(_MARK.sub(" ", text.casefold())))


def _numbers(words: Words) -> list[str]:
    return [word for word in words if word.isdigit()]


def _shingles(words: Words) -> set[Words]:
    return {words[at : at + SHINGLE] for at in range(len(words) - SHINGLE + 1)}
