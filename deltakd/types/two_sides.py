"""The tokens and the logits of a chunk in two tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from deltakd.types.alignment import Alignment, TokenMap
from deltakd.types.batch import Batch, TokenStream
from deltakd.types.heads import Head


@dataclass(frozen=True)
class SideTokens:
    """The valid tokens of one side.

    Args:
        labels: [N] int64.
        previous: [N] int64: the input token whose hidden state predicts the label.
        rows: [N] int64, ascending: the row that each token belongs to.
    """

    labels: Tensor
    previous: Tensor
    rows: Tensor

    @classmethod
    def of(cls, stream: TokenStream) -> SideTokens:
        """Return the valid tokens of a stream."""
        return cls(stream.labels_N, stream.input_ids.flatten()[stream.valid_N], stream.rows_N)

    def part(self, tokens: slice) -> SideTokens:
        """Return some of the tokens."""
        return SideTokens(self.labels[tokens], self.previous[tokens], self.rows[tokens])


@dataclass(frozen=True)
class AlignedTokens:
    """The valid tokens of both sides, and how they correspond.

    Args:
        student: the N tokens of the student's tokenizer.
        other: the M tokens of the teachers'.
        alignment: of these tokens.
        token_map: of the two vocabularies.
    """

    student: SideTokens
    other: SideTokens
    alignment: Alignment
    token_map: TokenMap

    @classmethod
    def of(cls, batch: Batch, token_map: TokenMap) -> AlignedTokens:
        """Return the tokens of a batch; if all models share one tokenizer, each token is a span."""
        student = SideTokens.of(batch)
        if batch.other is None:
            spans = torch.arange(len(student.labels))
            alignment = Alignment.of(spans, spans).to(student.labels.device, non_blocking=True)
            return cls(student, student, alignment, token_map)
        return cls(student, SideTokens.of(batch.other.stream), batch.other.alignment, token_map)

    def part(self, student: slice, other: slice) -> AlignedTokens:
        """Return the tokens of one chunk."""
        alignment = self.alignment.part(student, other)
        return AlignedTokens(self.student.part(student), self.other.part(other), alignment, self.token_map)

    def with_alignment(self, alignment: Alignment) -> AlignedTokens:
        """Return the tokens under another alignment."""
        return replace(self, alignment=alignment)


@final
class AlignedLogits(Mapping[str, Tensor]):
    """Logits by role, those of the references computed on first access.

    Args:
        made: logits that exist, on the graph: [n, V] of the student; what a loss derived from hidden states.
        heads: role -> Head of the references: over the student's n tokens, or over the teachers' m.
        tokens: of the chunk.
    """

    def __init__(self, made: Mapping[str, Tensor], heads: Mapping[str, Head], tokens: AlignedTokens) -> None:
        self._made = dict(made)
        self._heads = heads
        self._names = (*made, *heads)
        self.tokens = tokens

    def __getitem__(self, role: str) -> Tensor:
        if role not in self._made:
            with torch.no_grad():
                self._made[role] = self._heads[role].logits()
        return self._made[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
