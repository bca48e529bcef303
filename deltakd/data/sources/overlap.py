"""Finds tasks of one set of rows in another, word for word or nearly: a test set that was trained on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from deltakd.data.sources.near import Texts, near_duplicates
from deltakd.data.sources.rows import Row, message_text
from deltakd.io.progress import progress_bar

#: An instruction with more different inputs than this ("Summarise this text.") says nothing without its input.
GENERIC_INPUTS = 5
#: Fewer rows than this are compared in a second and need no progress bar.
LONG_SEARCH = 20_000
#: Rows between two updates of the bar.
_STRIDE = 1_000

#: The Alpaca frame around instruction and input, in files that hold whole prompts.
_FRAME = re.compile(r"### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:", re.DOTALL)

#: Numbers of an instruction and of an input.
_Task = tuple[int, int]


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
    others = list(others)
    search = _Search(asked, others)
    best: dict[_Task, Overlap] = {}
    for task, at in search.others.items():
        for match, similarity in search.matches(task):
            overlap = Overlap(0, others[at[0]].id, similarity, task == match)
            held = best.get(match)
            if held is None or (overlap.exact, overlap.similarity) > (held.exact, held.similarity):
                best[match] = overlap
    found = {at: overlap for task, overlap in best.items() for at in search.asked[task]}
    return [Overlap(asked[at].id, found[at].other_id, found[at].similarity, found[at].exact) for at in sorted(found)]


def overlapping(rows: Sequence[Row], banned: Sequence[Row]) -> set[int]:
    """Return the positions of the ``rows`` whose task is among ``banned``, by the rules of ``find_overlaps``."""
    search = _Search(banned, rows)
    return {at for task, found in search.others.items() if any(search.matches(task)) for at in found}


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


def task_texts(row: Row) -> tuple[str, str]:
    """Return instruction and input, taken out of Alpaca's frame if the row holds a whole prompt in it.

    Of a conversation, return its last question, and all turns before it, the system prompt included.
    """
    if row.messages is not None:
        last = len(row.asked)
        while last and row.asked[last - 1]["role"] == "user":
            last -= 1
        asked, before = row.asked[last:], row.asked[:last]
        return "\n\n".join(map(message_text, asked)), "\n\n".join(map(message_text, before))
    framed = None if row.prompt is None else _FRAME.search(row.prompt)
    return (framed[1], framed[2] or "") if framed else (row.question, row.input)


class _Search:
    """The tasks of both sets whose instructions are alike, by the numbers of their texts, and which texts are alike.

    Args:
        asked: rows whose tasks are looked for.
        others: rows by whose tasks they are looked for.
    """

    def __init__(self, asked: Sequence[Row], others: Sequence[Row]) -> None:
        instructions, inputs = Texts(), Texts()
        rows = len(asked) + len(others)
        with progress_bar("looking for near duplicates", rows, rows >= LONG_SEARCH) as advance:
            left = _numbered(asked, instructions, advance)
            right = _numbered(others, instructions, lambda done: advance(len(asked) + done))
        self._generic = {instructions.number(text) for text in generic_instructions([*asked, *others])}
        self._alike = near_duplicates(instructions.words, {one for one, _ in left}, {one for one, _ in right})
        # Most inputs are never compared, since their instructions are unlike all others.
        self.asked = _by_task(left, {one for found in self._alike.values() for one in found}, inputs)
        self.others = _by_task(right, self._alike.keys(), inputs)
        self._empty = inputs.number("")
        self._alike_inputs = near_duplicates(
            inputs.words, {given for _, given in self.asked}, {given for _, given in self.others}
        )
        self._inputs: defaultdict[int, list[int]] = defaultdict(list)
        for instruction, given in self.asked:
            self._inputs[instruction].append(given)

    def matches(self, task: _Task) -> Iterator[tuple[_Task, float]]:
        """Yield each of the asked tasks that ``task`` repeats, with the similarity of their instructions."""
        instruction, given = task
        for other, similarity in self._alike.get(instruction, {}).items():
            for found in self._same_inputs(other, given, {instruction, other}.isdisjoint(self._generic)):
                yield (other, found), similarity

    def _same_inputs(self, instruction: int, given: int, may_lack: bool) -> Iterable[int]:
        """Inputs of an asked instruction that count as ``given``; ``may_lack``: whether an empty one does."""
        if given == self._empty and may_lack:
            return self._inputs[instruction]
        counting = {*self._alike_inputs.get(given, ()), *([self._empty] if may_lack else ())}
        return [found for found in counting if (instruction, found) in self.asked]


def _numbered(rows: Sequence[Row], instructions: Texts, advance: Callable[[int], None]) -> list[tuple[int, str]]:
    """Return number of the instruction and input of each row."""
    found = []
    for at, row in enumerate(rows):
        instruction, given = task_texts(row)
        found.append((instructions.number(instruction), given))
        if at and at % _STRIDE == 0:
            advance(at)
    return found


def _by_task(rows: Iterable[tuple[int, str]], wanted: Collection[int], inputs: Texts) -> dict[_Task, list[int]]:
    """Return task -> positions of its rows in order, for the instructions that are wanted."""
    found: defaultdict[_Task, list[int]] = defaultdict(list)
    for at, (instruction, given) in enumerate(rows):
        if instruction in wanted:
            found[instruction, inputs.number(given)].append(at)
    return dict(found)
