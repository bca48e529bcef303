"""A micro-batch, and where its valid tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from deltakd.types.alignment import Alignment
from deltakd.types.heads import PairFacts, TokenFacts
from deltakd.types.packed import PackedRows
from deltakd.types.role_names import STUDENT, STUDENT_RAW

#: The label of a position that is not trained on (prompt, padding).
IGNORE_INDEX = -100


@dataclass
class TokenStream:
    """Rows of one micro-batch in one tokenizer, padded on the right.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 1 on real tokens.
        labels: [B, T] int64; the token itself where it is trained on, else IGNORE_INDEX. Not shifted: position t
            is predicted from the hidden state at t − 1.
        packed: the same rows as models run them, several to a sequence; None: as they are here.
        images: the rows' images as transformers' processor gives them: name -> tensor; None: there are none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    packed: PackedRows | None = field(default=None, kw_only=True)
    images: dict[str, Tensor] | None = field(default=None, kw_only=True)
    _valid: Tensor | None = field(default=None, kw_only=True)
    _real: int | None = field(default=None, kw_only=True)

    @property
    def real_positions(self) -> int:
        """Number of positions that are no padding; like ``valid_N`` counted once, before the batch moves."""
        if self._real is None:
            self._real = int(self.attention_mask.sum())
        return self._real

    @property
    def positions(self) -> int:
        """Number of positions that a model computes."""
        return (self if self.packed is None else self.packed).input_ids.numel()

    @property
    def valid_BT(self) -> Tensor:
        """[B, T−1] bool: True where the *next* token is trained on."""
        return self.labels[:, 1:] != IGNORE_INDEX

    @property
    def valid_N(self) -> Tensor:
        """[N] int64: indices into the flattened [B, T] where the valid tokens are predicted, in row-major order.

        Computed once, before the batch moves: on a GPU the search forces a synchronisation.
        """
        if self._valid is None:
            row_N, position_N = torch.where(self.valid_BT)
            self._valid = row_N * self.labels.shape[1] + position_N
        return self._valid

    @property
    def labels_N(self) -> Tensor:
        """[N] int64: the tokens trained on, in row-major order."""
        return self.labels.flatten()[self.valid_N + 1]

    @property
    def rows_N(self) -> Tensor:
        """[N] int64, ascending: the row of each valid token."""
        return self.valid_N // self.labels.shape[1]

    def at_valid(self, values_BTD: Tensor) -> Tensor:
        """Return [N, D], the values at the positions that predict the valid tokens."""
        return values_BTD.flatten(0, 1)[self.valid_N]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the stream with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            attention_mask=self.attention_mask.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            _valid=self.valid_N.to(device, non_blocking=non_blocking),
            _real=self.real_positions,
            packed=None if self.packed is None else self.packed.to(device, non_blocking),
            images=_moved(self.images, device, non_blocking),
        )

    def stream_of(self, role: str) -> TokenStream:
        """Return the rows in the tokenizer of a role's model."""
        return self

    def pinned(self) -> Self:
        """Return the stream in page-locked memory, from which a GPU copies while the host goes on."""
        self._valid, self._real = self.valid_N, self.real_positions
        return _pinned(self)


@dataclass
class AlignedStream:
    """The rows of a micro-batch in the teachers' tokenizer.

    Args:
        stream: the rows, each in the teachers' own template; M valid tokens.
        alignment: of the student's N valid tokens with these M.
    """

    stream: TokenStream
    alignment: Alignment

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AlignedStream:
        """Return the stream with its tensors on ``device``."""
        return AlignedStream(self.stream.to(device, non_blocking), self.alignment.to(device, non_blocking))


class StepPairs(NamedTuple):
    """The pairs of an optimiser step, over all ranks and micro-batches.

    Args:
        pairs: their number.
        given_tokens: valid tokens of the data's responses.
    """

    pairs: int
    given_tokens: int


@dataclass
class Route:
    """The rows of a micro-batch that one pair of teachers judges.

    Args:
        pair: its number, from 1 (``teacher_pair``).
        tokens: [n] int64, the rows' tokens among the batch's N valid ones.
        stream: the rows alone.
    """

    pair: int
    tokens: Tensor
    stream: TokenStream

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Route:
        """Return the route with its tensors on ``device``."""
        return Route(self.pair, self.tokens.to(device, non_blocking=non_blocking), self.stream.to(device, non_blocking))


@dataclass
class Batch(TokenStream):
    """Rows of one micro-batch, in the student's tokenizer.

    Args:
        row_ids: [B] int64, the row's number in its data set; stays on the CPU.
        step: the optimiser step (from 0) that this micro-batch belongs to.
        step_tokens: the student's valid tokens in that whole optimiser step, over all ranks and micro-batches.
        sampled_log_probs: [B, T] float32 nats: each label's log-prob when an earlier student sampled it, 0 elsewhere;
            None: as for ``TokenFacts``.
        other: the same rows in the teachers' tokenizer; None: all models share the student's.
        routes: the rows of each pair of teachers; empty: the first pair judges all rows.
        pairs: of the whole step: rows 2i and 2i + 1 then answer the same prompt, the data's response first and the
            student's after it. None: rows are not in pairs.
        cached: what a cache of references holds for the rows, read ahead; None: it is read when it is needed.
        asked: numbers of the requests sent ahead to a server of references; None: they are sent when the step starts.
        image_digests: what identifies the images of each row, b"" if it has none; None: no row has any.
    """

    row_ids: Tensor
    step: int
    step_tokens: int
    sampled_log_probs: Tensor | None = None
    other: AlignedStream | None = None
    routes: tuple[Route, ...] = ()
    pairs: StepPairs | None = None
    cached: dict[str, Tensor] | None = None
    asked: tuple[int, ...] | None = None
    image_digests: list[bytes] | None = None

    @property
    def facts_N(self) -> TokenFacts:
        """Facts about the N valid tokens: their rows, their log-probs at sampling time, and their pairs."""
        sampled = None if self.sampled_log_probs is None else self.sampled_log_probs.flatten()[self.valid_N + 1]
        rows_N = self.rows_N
        if self.pairs is None:
            return TokenFacts(rows_N, sampled)
        tokens = (self.step_tokens / self.pairs.pairs, self.step_tokens / self.pairs.given_tokens)
        return TokenFacts(rows_N, sampled, pairs=PairFacts(rows_N // 2, rows_N % 2 == 0, *tokens))

    def stream_of(self, role: str) -> TokenStream:
        """Return the rows in the tokenizer of a role's model."""
        return self if self.other is None or role in (STUDENT, STUDENT_RAW) else self.other.stream

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch with its tensors on ``device``, all but ``row_ids``."""
        sampled = self.sampled_log_probs
        return replace(
            super().to(device, non_blocking),
            sampled_log_probs=None if sampled is None else sampled.to(device, non_blocking=non_blocking),
            other=None if self.other is None else self.other.to(device, non_blocking),
            routes=tuple(route.to(device, non_blocking) for route in self.routes),
            cached=_moved(self.cached, device, non_blocking),
        )

    def routed(self, pairs: Sequence[int]) -> Self:
        """Return the batch with the rows of each pair of teachers; on the CPU, before it moves.

        Args:
            pairs: [B] the number of each row's pair, from 1.
        """
        routes = []
        for pair in sorted(set(pairs)):
            rows = torch.tensor([row for row, its in enumerate(pairs) if its == pair])
            length = int(self.attention_mask[rows].sum(1).max())
            part = (values[rows, :length] for values in (self.input_ids, self.attention_mask, self.labels))
            tokens_N = torch.where(torch.isin(self.rows_N, rows))[0]
            routes.append(Route(pair, tokens_N, TokenStream(*part)))
        return replace(self, routes=tuple(routes))


def _moved(
    tensors: dict[str, Tensor] | None, device: torch.device | str, non_blocking: bool
) -> dict[str, Tensor] | None:
    if tensors is None:
        return None
    return {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()}


def _pinned(value: Any) -> Any:
    """Return a tensor, or all tensors of a dataclass, in page-locked memory."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    if type(value) is tuple:
        return tuple(map(_pinned, value))
    if isinstance(value, dict):
        return {name: _pinned(entry) for name, entry in value.items()}
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{field.name: _pinned(getattr(value, field.name)) for field in fields(value)})
