"""Blocks of text drawn from a stream of documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import NDArray

from deltakd.data.encoding.example_stream import Counts, Drawn, Example, ExampleStream, Mark, Taking, flat
from deltakd.data.encoding.packing import pieces_of
from deltakd.data.encoding.tokens import TextEncoder
from deltakd.data.sources.passes import Passes, Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@final
class BlockExamples(ExampleStream[str, NDArray[np.int32]]):
    """Documents joined by EOS and cut into blocks in which every token is trained, as ``pack_texts`` does.

    Blocks cross the borders of documents, buffers and passes, so all have the same length. A block's row id is its
    number in the run.

    Args:
        passes: the documents, in order.
        tokenizer: must have an EOS token. No other thread may use it.
        block_length: tokens per block.
        max_tokens: as for ``ExampleStream``.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """

    batch = 64

    def __init__(
        self,
        passes: Passes[str],
        tokenizer: PreTrainedTokenizerBase,
        block_length: int,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(passes, block_length, block_length, max_tokens)
        self._encoder = TextEncoder(tokenizer)
        self._length = block_length

    def _encode(self, rows: list[str]) -> list[NDArray[np.int32]]:
        pieces = [(place, piece) for place, row in enumerate(rows) for piece, _ in pieces_of(row, self._length)]
        tokens: list[list[int]] = [[] for _ in rows]
        for (place, _), ids in zip(pieces, self._encoder.documents([piece for _, piece in pieces]), strict=True):
            tokens[place] += ids
        return [flat([*ids, self._encoder.end]) for ids in tokens]

    def _taking(self, counts: Counts) -> Taking[NDArray[np.int32]]:
        return _TakingTokens(counts, self._length)

    def _nothing(self, counts: Counts) -> str:
        return (
            f"a whole pass over the stream ({counts.rows} documents) does not fill one block of {self._length} "
            "tokens; give more text, lower data.max_length, or leave out data.streaming=true"
        )


class _TakingTokens(Taking[NDArray[np.int32]]):
    def __init__(self, counts: Counts, length: int) -> None:
        super().__init__(counts)
        self._block = np.empty(length, dtype=np.int32)
        self._filled = 0
        self._begun = Mark()

    def take(self, row: NDArray[np.int32], place: Place, item: int, skip: int) -> Iterator[Drawn]:
        at = skip
        while at < len(row):
            if not self._filled:
                self._begun = Mark(place, item, at, self.counts)
            more = row[at : at + len(self._block) - self._filled]
            self._block[self._filled : self._filled + len(more)] = more
            at += len(more)
            self._filled += len(more)
            if self._filled == len(self._block):
                block = self._block.copy()
                yield Drawn(Example(block, block, self._begun.counts.examples), self._begun)
                self.counts = self.counts.plus(examples=1, tokens=len(block))
                self._filled = 0
