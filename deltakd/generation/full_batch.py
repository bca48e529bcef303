"""The rows decoded together: how they start, how finished rows leave, and how new ones join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltakd.generation import key_values
from deltakd.generation.noise import NoiseKey


@dataclass
class Row:
    """One answer in progress.

    Args:
        row_id: the row in the data set.
        prompt: its tokens.
        budget: most tokens of the answer.
        noise: key of the noise; None: greedy decoding.
        number: place of the prompt among all prompts.
        end: the EOS that ended the answer.
    """

    row_id: int
    prompt: Sequence[int]
    budget: int
    noise: NoiseKey | None
    number: int = 0
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    end: int | None = None

    def take(self, token: int, eos_ids: frozenset[int]) -> None:
        """Add a token; finish on EOS or when the budget is used up.

        Raises:
            ValueError: the token is negative, which marks logits that are no distribution (so that the check needs no
                second device sync).
        """
        if token < 0:
            raise ValueError(
                f"The model's logits are NaN for row {self.row_id} after {len(self.tokens)} new tokens. The model has "
                "diverged or its dtype overflows: evaluate an earlier checkpoint, or use bfloat16 or float32."
            )
        if token in eos_ids:
            self.finished, self.end = True, token
            return
        self.tokens.append(token)
        self.finished = len(self.tokens) >= self.budget


@dataclass
class DecodingState:
    """The rows in the model's input, and what the model needs to continue them.

    Args:
        rows: B rows.
        input_ids: [B, t] tokens that are not in the cache yet.
        mask: [B, T] int64 over everything so far. Padding is on the left; new columns of a finished row are 0, so its
            position does not change.
        history: [B, T] the text so far; padding on the left is −1, −2, …, so that no n-gram of padding ever repeats.
        positions: [B, t] of ``input_ids`` in their rows.
        cache: the model's own cache object; None before the first step.
    """

    rows: list[Row]
    input_ids: Tensor
    mask: Tensor
    history: Tensor
    positions: Tensor
    cache: Any = None

    @classmethod
    def of(cls, rows: list[Row], pad_id: int, device: torch.device) -> DecodingState:
        """Return the initial state of ``rows``, padded on the left."""
        width = max(len(row.prompt) for row in rows)
        pads = [width - len(row.prompt) for row in rows]
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in pads], device=device)
        input_ids = torch.tensor(
            [[pad_id] * n + list(row.prompt) for row, n in zip(rows, pads, strict=True)], device=device
        )
        return cls(rows, input_ids, mask, _history(input_ids, mask), (mask.cumsum(dim=1) - 1).clamp(min=0))

    @property
    def live(self) -> int:
        """Number of unfinished rows."""
        return sum(not row.finished for row in self.rows)

    def take(self, tokens_B: Tensor, eos_ids: frozenset[int]) -> None:
        """Add a token to each unfinished row and make the tokens the next input, masked for finished rows."""
        for row, token in zip(self.rows, tokens_B.tolist(), strict=True):
            if not row.finished:
                row.take(token, eos_ids)
        tokens_B = tokens_B.clamp(min=0)
        live_B1 = torch.tensor([[int(not row.finished)] for row in self.rows], device=self.mask.device)
        self.input_ids = tokens_B.unsqueeze(1)
        self.mask = torch.cat([self.mask, live_B1], dim=1)
        self.history = torch.cat([self.history, self.input_ids], dim=1)
        self.positions = self.positions[:, -1:] + live_B1

    def repeat(self, rows: list[Row], sources: list[int]) -> None:
        """Replace the rows: ``rows[i]`` continues from row ``sources[i]``, which may occur several times."""
        self._select(sources, self.mask.shape[1])
        self.rows = rows

    def drop_finished(self) -> None:
        """Remove the finished rows, and the columns that are padding in all others."""
        self._select([i for i, row in enumerate(self.rows) if not row.finished], self._width)

    def make_room(self) -> None:
        """If the cache is static and stands at its last column, move it back over columns that no row needs."""
        if key_values.is_full(self.cache):
            self._select(list(range(len(self.rows))), self._width)

    def admit(self, other: DecodingState) -> None:
        """Take in the rows of ``other``: first in the places of finished rows, then in new ones."""
        if other.live < len(other.rows):
            other.drop_finished()
        places = [i for i, row in enumerate(self.rows) if row.finished][: len(other.rows)]
        lacking = len(other.rows) - len(places)
        width = max(self._width, other.mask.shape[1])
        if lacking or width > self.mask.shape[1]:
            places += range(len(self.rows), len(self.rows) + lacking)
            self._select([*range(len(self.rows)), *[0] * lacking], max(width, self.mask.shape[1]))
        indices = torch.tensor(places, device=self.mask.device)
        key_values.replace(self.cache, indices, other.cache, self._cached(width))
        self.mask = self.mask[:, -width:].index_copy(0, indices, _aligned(other.mask, width))
        self.history = self.history[:, -width:].index_copy(0, indices, _aligned(other.history, width))
        self.history = _history(self.history, self.mask)
        self.input_ids = self.input_ids.index_copy(0, indices, other.input_ids)
        self.positions = self.positions.index_copy(0, indices, other.positions)
        for place, row in zip(places, other.rows, strict=True):
            self.rows[place] = row

    @property
    def _width(self) -> int:
        """Number of columns that the unfinished rows need."""
        return max(len(row.prompt) + len(row.tokens) for row in self.rows if not row.finished)

    def _cached(self, width: int) -> int:
        """Return the cache's number of columns when the mask has ``width``."""
        missing: int = self.mask.shape[1] - self.cache.get_seq_length()
        return width - missing

    def _select(self, keep: list[int], width: int) -> None:
        """Keep some rows and change the width; columns are added or removed on the left."""
        indices = torch.tensor(keep, device=self.mask.device)
        key_values.select(self.cache, keep, self._cached(width))
        self.mask, self.history = (_aligned(tensor, width)[indices] for tensor in (self.mask, self.history))
        self.history = _history(self.history, self.mask)
        self.input_ids, self.positions = self.input_ids[indices], self.positions[indices]
        self.rows = [self.rows[i] for i in keep]


def _aligned(tensor_BT: Tensor, width: int) -> Tensor:
    missing = width - tensor_BT.shape[1]
    return pad(tensor_BT, (missing, 0)) if missing > 0 else tensor_BT[:, -missing:]


def _history(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    # Not what follows the end of a finished row: an n-gram may end in it, and its last token would be banned by id.
    before_BT = mask_BT.cumsum(dim=1) == 0
    padding_T = -1 - torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return torch.where(before_BT, padding_T, ids_BT)
