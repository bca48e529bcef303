"""Finds tasks of one set of rows in another, verbatim or nearly, such as test tasks in training data."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from deltakd.data.sources.near import Corpus
from deltakd.data.sources.rows import Row
from deltakd.data.sources.stored_rows import reading_code, rows_digest, taken, tasks_of
from deltakd.data.sources.tasks import Tasks, generic_instructions, task_texts
from deltakd.io.arrays import ArrayWriter, kept_arrays
from deltakd.io.progress import progress_bar

#: Comparing fewer rows than this takes a second and needs no progress bar.
LONG_SEARCH = 20_000
#: Rows between two updates of the progress bar.
_STRIDE = 1_000

#: Numbers of an instruction and of an input.
_Task = tuple[int, int]
#: Number of an input that is similar to none of those it is compared with.
_OTHER = -1


@dataclass(frozen=True)
class Overlap:
    """A row whose task also occurs in the other set.

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
    """Return the rows of ``asked`` whose task occurs in ``others``, in order, each with its most similar row.

    Words are compared after case folding, without punctuation and reference marks; in scripts without spaces, a
    character is a word. Two tasks are the same if

    * their instructions have the same words, or are near duplicates (``near``: problems of one form differ only in
      their numbers; instructions shorter than SHINGLE words must be identical), and
    * their inputs have the same words, or are near duplicates, or one of them is empty: a question asked with and
      without a passage. A generic instruction (with more than GENERIC_INPUTS different inputs in both sets together)
      needs its input.

    Args:
        asked: an evaluation set.
        others: training rows.
    """
    return OverlapSearch(others if isinstance(others, Sequence) else list(others)).overlaps(asked)


@final
class OverlapSearch:
    """Finds the overlaps of several sets with the same rows, and reads the rows' instructions only once.

    Args:
        others: training rows.
        cache_dir: folder that keeps the results for later runs; None: keep nothing.
    """

    def __init__(self, others: Sequence[Row], cache_dir: str | Path | None = None) -> None:
        self._others = others
        self._cache_dir = cache_dir
        self._instructions: _Instructions | None = None

    def overlaps(self, asked: Sequence[Row]) -> list[Overlap]:
        """Return the overlaps; see ``find_overlaps``."""
        if self._cache_dir is None:
            return self._found(asked)

        def build(writer: ArrayWriter) -> None:
            writer.meta["overlaps"] = [astuple(overlap) for overlap in self._found(asked)]

        parts = (reading_code(), rows_digest(asked), rows_digest(self._others))
        key = hashlib.sha256(":".join(parts).encode()).hexdigest()
        kept = kept_arrays(f"overlaps-{key}", self._cache_dir, {}, build, "the overlaps")
        return [Overlap(*values) for values in kept.meta["overlaps"]]

    def _found(self, asked: Sequence[Row]) -> list[Overlap]:
        if self._instructions is None:
            self._instructions = _Instructions(self._others)
        search = _Search(asked, self._instructions)
        best: dict[_Task, Overlap] = {}
        for task, at in search.others.items():
            for match, similarity in search.matches(task):
                overlap = Overlap(0, self._others[at[0]].id, similarity, task == match)
                held = best.get(match)
                if held is None or (overlap.exact, overlap.similarity) > (held.exact, held.similarity):
                    best[match] = overlap
        found = {at: overlap for task, overlap in best.items() for at in search.asked[task]}
        return [
            Overlap(asked[at].id, found[at].other_id, found[at].similarity, found[at].exact) for at in sorted(found)
        ]


def overlapping(rows: Sequence[Row], banned: Sequence[Row]) -> set[int]:
    """Return the positions of the ``rows`` whose task is among ``banned``, by the rules of ``find_overlaps``."""
    search = _Search(banned, _Instructions(rows))
    return {at for task, found in search.others.items() if any(search.matches(task)) for at in found}


class _Instructions:
    """The instructions of rows.

    Args:
        rows: any number of rows.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.tasks = tasks_of(rows)
        self.corpus = Corpus()
        self.places = self.corpus.add(_shown("looking for near duplicates", rows, 0))


class _Search:
    """The tasks of both sets with similar instructions, by the numbers of their texts, and which texts are similar.

    Tasks of the others that can't be similar are left out; inputs similar to none of the asked ones are ``_OTHER``.

    Args:
        asked: rows whose tasks to look for; few.
        others: instructions of the rows to search; any number.
    """

    def __init__(self, asked: Sequence[Row], others: _Instructions) -> None:
        left = others.corpus.add(task_texts(row)[0] for row in asked)
        near = others.corpus.near(left, others.places)
        self._alike, left, right = near.found, near.numbers[left], near.numbers[others.places]
        self._generic = _generic(left, right, tasks_of(asked), others.tasks)
        # Most inputs are never compared, since their instructions are similar to no other.
        met = {one for found in self._alike.values() for one in found}
        asking = np.flatnonzero(np.isin(left, list(met)))
        asked_by = np.flatnonzero(np.isin(right, list(self._alike)))
        inputs = Corpus()
        given_left = inputs.add(task_texts(asked[at])[1] for at in asking.tolist())
        given_right = inputs.add(_shown("comparing inputs", taken(others.rows, asked_by), 1))
        empty = inputs.add([""])
        # An empty input counts as a different one, even if no row has it.
        given = inputs.near(given_left, np.append(given_right, empty))
        self._alike_inputs, self._empty = given.found, int(given.numbers[empty[0]])
        self.asked = _by_task(asking, left, given.numbers[given_left])
        given_right = given.numbers[given_right]
        known = np.isin(given_right, [*self._alike_inputs, self._empty])
        possible = known | ~np.isin(right[asked_by], list(self._generic))
        given_right = np.where(known, given_right, _OTHER)
        self.others = _by_task(asked_by[possible], right, given_right[possible])
        self._inputs: defaultdict[int, list[int]] = defaultdict(list)
        for instruction, found in self.asked:
            self._inputs[instruction].append(found)

    def matches(self, task: _Task) -> Iterator[tuple[_Task, float]]:
        """Yield each of the asked tasks that ``task`` repeats, with the similarity of their instructions."""
        instruction, given = task
        for other, similarity in self._alike.get(instruction, {}).items():
            for found in self._same_inputs(other, given, {instruction, other}.isdisjoint(self._generic)):
                yield (other, found), similarity

    def _same_inputs(self, instruction: int, given: int, may_lack: bool) -> Iterable[int]:
        """Return inputs of an asked instruction that count as ``given``; ``may_lack``: True if an empty one does."""
        if given == self._empty and may_lack:
            return self._inputs[instruction]
        counting = {*self._alike_inputs.get(given, ()), *([self._empty] if may_lack else ())}
        return [found for found in counting if (instruction, found) in self.asked]


def _shown(what: str, rows: Sequence[Row], part: int) -> Iterator[str]:
    """Yield the instruction (part 0) or input (1) of each row, with a progress bar."""
    with progress_bar(what, len(rows), len(rows) >= LONG_SEARCH) as advance:
        for at, row in enumerate(rows):
            if at % _STRIDE == 0:
                advance(at)
            yield task_texts(row)[part]


def _generic(left: NDArray[np.int64], right: NDArray[np.int64], asked: Tasks, others: Tasks) -> set[int]:
    """Return the numbers of the instructions that are generic, given those of both sets."""
    both = Tasks(*(np.concatenate(pair) for pair in zip(asked, others, strict=True)))
    return set(np.concatenate([left, right])[np.isin(both.instructions, generic_instructions(both))].tolist())


def _by_task(
    places: NDArray[np.int64], instructions: NDArray[np.int64], inputs: NDArray[np.int64]
) -> dict[_Task, list[int]]:
    """Return task -> positions of its rows, in order.

    Args:
        places: [n] positions of rows.
        instructions: [rows] number of each row's instruction.
        inputs: [n] numbers of the inputs at ``places``.
    """
    found: defaultdict[_Task, list[int]] = defaultdict(list)
    for place, instruction, given in zip(places.tolist(), instructions[places].tolist(), inputs.tolist(), strict=True):
        found[instruction, given].append(place)
    return dict(found)
