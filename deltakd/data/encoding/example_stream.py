"""From streamed rows to examples, starting anywhere; here instruction rows, one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from deltakd.data.encoding.encode import Outcome, check_limits
from deltakd.data.encoding.encoded_set import Encoded, pair_of
from deltakd.data.encoding.examples import examples
from deltakd.data.encoding.segments import Template
from deltakd.data.encoding.two_tokenizers import Coding, TwoTokenizers
from deltakd.data.sources.passes import Passes, Place
from deltakd.data.sources.rows import Row
from deltakd.data.sources.shards import Shard
from deltakd.types import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: An item of a shard, and its tokens.
R = TypeVar("R")
E = TypeVar("E")


def flat(ids: list[int]) -> NDArray[np.int32]:
    """Return [ids] int32."""
    return np.array(ids, dtype=np.int32)


class Counts(NamedTuple):
    """Counts of the rows before a place in the stream, by outcome.

    Args:
        rows: rows or documents read.
        examples: examples or blocks made from them.
        tokens: their tokens.
        excluded: rows left out because their task must not be trained on.
        dropped: rows left out as too long, or with nothing to train on.
        cut_prompts, cut_responses, kept_borders, control_tokens: number of such rows; see ``Outcome``.
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    excluded: int = 0
    dropped: int = 0
    cut_prompts: int = 0
    cut_responses: int = 0
    kept_borders: int = 0
    control_tokens: int = 0

    def plus(self, **more: int) -> Counts:
        """Return the counts with these added."""
        return self._replace(**{name: getattr(self, name) + count for name, count in more.items()})

    def with_all(self, others: Iterable[Counts]) -> Counts:
        """Return the counts with all these added."""
        return Counts(*map(sum, zip(self, *others, strict=True)))

    def since(self, before: Counts) -> Counts:
        """Return the counts since then."""
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


class Mark(NamedTuple):
    """Where an example begins; the stream can continue from there.

    Args:
        buffer: where its buffer begins.
        item: place of its row in the shuffled buffer.
        skip: examples (for text, tokens) of that row before it.
        counts: of everything before it. Rows excluded from a buffer count once the buffer is used up.
    """

    buffer: Place = Place()
    item: int = 0
    skip: int = 0
    counts: Counts = Counts()

    @property
    def epoch(self) -> int:
        """The pass that the example comes from, counted from 0."""
        return self.buffer.epoch

    def numbers(self) -> list[list[int]]:
        """Return the mark as plain numbers, for a checkpoint."""
        return [list(self.buffer), [self.item, self.skip], list(self.counts)]

    @classmethod
    def of(cls, numbers: Sequence[Sequence[int]]) -> Mark:
        """Return the mark from these numbers."""
        place, (item, skip), counts = numbers
        return cls(Place(*place), item, skip, Counts(*counts))


class Example(NamedTuple):
    """One tokenised row in a sixth of the memory of lists: a stream holds about ten thousand of them.

    Args:
        input_ids: [T] int32, prompt and response.
        labels: [T] int32, as in ``Encoded``.
        row_id: the row's number.
        spans, other, route: as in ``Encoded``.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    row_id: int
    spans: NDArray[np.int32] | None = None
    other: Example | None = None
    route: int | None = None

    @classmethod
    def of(cls, encoded: Encoded) -> Example:
        """Return an encoded row as an example.

        Raises:
            ValueError: it has images.
        """
        if encoded.images is not None:
            raise ValueError(
                f"row {encoded.row_id} holds images, which a stream does not carry; give data.streaming=false"
            )
        return cls(
            flat(encoded.input_ids),
            flat(encoded.labels),
            encoded.row_id,
            None if encoded.spans is None else flat(encoded.spans),
            None if encoded.other is None else cls.of(encoded.other),
            encoded.route,
        )

    @property
    def valid_tokens(self) -> int:
        """Trained tokens; nothing predicts position 0."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


class Drawn(NamedTuple):
    """An example and its place in the stream."""

    example: Example
    mark: Mark


class Taking(ABC, Generic[E]):
    """Turns tokenised rows into examples, and counts them."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    @abstractmethod
    def take(self, row: E, place: Place, item: int, skip: int) -> Iterator[Drawn]:
        """Yield the examples that a row completes, without its first ``skip`` examples (for text, tokens)."""


class ExampleStream(ABC, Generic[R, E]):
    """An endless stream of examples that can start at any mark; a pure function of its data and seed.

    Args:
        passes: the rows, in order.
        max_length: maximum tokens per example.
        block_length: tokens per example, if all have the same number.
        max_tokens: total tokens to train on; None: as many as the run has steps for.
    """

    #: Tokens that all models share; None: as many as the tokenizer has.
    vocabulary: int | None = None
    #: Task -> number of the pair of teachers that judges its rows; None: rows are not routed.
    routes: Mapping[str, int] | None = None
    #: Rows tokenised at once.
    batch = 256

    def __init__(
        self, passes: Passes[R], max_length: int, block_length: int | None = None, max_tokens: int | None = None
    ) -> None:
        self.passes = passes
        self.max_length = max_length
        self.block_length = block_length
        self.max_tokens = max_tokens

    def examples(self, mark: Mark | None = None) -> Iterator[Drawn]:
        """Yield the examples from a mark on, or from the beginning; never ends. Use one iterator at a time.

        Raises:
            ValueError: a shard or row can't be used, or a whole pass gives no example.
        """
        place, item, skip, counts = mark or Mark()
        taking = self._taking(counts)
        before = counts.examples if place == Place(place.epoch) and not item else None
        while True:
            buffer = self.passes.buffer_at(place)
            for first in range(item, len(buffer.items), self.batch):
                for number, row in enumerate(self._encode(buffer.items[first : first + self.batch]), first):
                    for drawn in taking.take(row, place, number, skip):
                        self._check_tokens(drawn.example)
                        yield drawn
                    taking.counts = taking.counts.plus(rows=1)
                    skip = 0
            excluded = buffer.read - len(buffer.items)
            taking.counts = taking.counts.plus(rows=excluded, excluded=excluded)
            if buffer.after.epoch > place.epoch:
                if before == taking.counts.examples:
                    raise ValueError(self._nothing(taking.counts))
                before = taking.counts.examples
            place, item = buffer.after, 0

    def _check_tokens(self, example: Example) -> None:
        largest = int(example.input_ids.max())
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise ValueError(
                f"row {example.row_id} of the stream has the token {largest}, and the models share only "
                f"{self.vocabulary}; take out the data that has it, or give models with a larger vocabulary"
            )

    @abstractmethod
    def _encode(self, rows: list[R]) -> list[E]:
        """Tokenise rows."""

    @abstractmethod
    def _taking(self, counts: Counts) -> Taking[E]:
        """Return an object that turns tokens into examples, starting from these counts."""

    @abstractmethod
    def _nothing(self, counts: Counts) -> str:
        """Say why a whole pass gave no example, and what to do."""


@final
class RowExamples(ExampleStream[Row, list[Outcome]]):
    """Instruction rows; each response is a separate example.

    Args:
        passes: the rows in their order.
        template, tokenizer, max_length, max_prompt_length, overlong, split_turns, teachers: as for ``encode_rows``. No
            other thread may use the tokenizers.

    Raises:
        ValueError: as ``check_limits``.
    """

    def __init__(
        self,
        passes: Passes[Row],
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        max_prompt_length: int,
        overlong: str,
        split_turns: bool = False,
        teachers: Coding | None = None,
    ) -> None:
        super().__init__(passes, max_length)
        self._split_turns = split_turns
        check_limits(tokenizer, max_length, max_prompt_length, overlong)
        student = Coding(template, tokenizer, max_length, max_prompt_length, overlong)
        self._encode_rows = student.encode if teachers is None else TwoTokenizers(student, teachers).encode

    def _encode(self, rows: list[Row]) -> list[list[Outcome]]:
        places = [(place, one) for place, row in enumerate(rows) for one in examples(row, self._split_turns)]
        outcomes: list[list[Outcome]] = [[] for _ in rows]
        encoded = self._encode_rows([row for _, row in places])
        for (place, _), outcome in zip(places, encoded, strict=True):
            if outcome.problem is not None:
                raise outcome.problem
            if outcome.encoded is not None:
                outcome.encoded.route = self._route(rows[place])
            outcomes[place].append(outcome)
        return outcomes

    def _route(self, row: Row) -> int | None:
        pair = None if self.routes is None else pair_of(row.task, self.routes)
        if self.routes is not None and pair is None:
            what = "no `task`" if row.task is None else f"the task {row.task}"
            raise ValueError(
                f"{row.label} of the stream has {what}, and model.routes has {', '.join(self.routes)}; add it, or give "
                "* for all other rows"
            )
        return pair

    def _taking(self, counts: Counts) -> Taking[list[Outcome]]:
        return _TakingRows(counts)

    def _nothing(self, counts: Counts) -> str:
        return (
            f"a whole pass over the stream ({counts.rows} rows) gives nothing to train on: {counts.excluded} rows are "
            f"in data.exclude or in the validation rows, {counts.dropped} were dropped as too long; exclude less, "
            "raise data.max_length, or set data.overlong=cut"
        )


class _TakingRows(Taking[list[Outcome]]):
    def take(self, row: list[Outcome], place: Place, item: int, skip: int) -> Iterator[Drawn]:
        kept = [outcome.encoded for outcome in row if outcome.encoded is not None]
        for number, encoded in enumerate(kept):
            if number >= skip:
                yield Drawn(Example.of(encoded), Mark(place, item, number, self.counts))
        self.counts = self.counts.plus(
            examples=len(kept),
            tokens=sum(len(encoded.input_ids) for encoded in kept),
            dropped=len(row) - len(kept),
            cut_prompts=sum(outcome.cut_prompt for outcome in row),
            cut_responses=sum(outcome.cut_response for outcome in row),
            kept_borders=sum(outcome.kept_border for outcome in row),
            control_tokens=sum(outcome.control_tokens for outcome in row),
        )


@dataclass(frozen=True)
class Stream:
    """Data too large to index: where it is, and how to read it.

    Args:
        shards: where it is.
        start: returns the stream for a seed.
        fingerprint: sha256 of everything that the examples depend on; for a file, its name and size.
    """

    shards: Sequence[Shard]
    start: Callable[[int], ExampleStream[Any, Any]]
    fingerprint: str

    @property
    def versions(self) -> dict[str, str]:
        """Shard -> what identifies its content."""
        return {shard.name: shard.version for shard in self.shards}
