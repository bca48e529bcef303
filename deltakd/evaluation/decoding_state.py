"""The rows that are being decoded together, and how finished ones leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Row:
    """One prompt on its way; ``stream`` is None for greedy decoding."""

    row_id: int
    prompt: Sequence[int]
    budget: int
    stream: np.random.Generator | None
    tokens: list[int] = field(default_factory=list)
    finished: bool = False

    def take(self, token: int, eos_ids: frozenset[int]) -> None:
        """Add a token, or finish on EOS; the last token of the budget finishes too."""
        if token in eos_ids:
            self.finished = True
            return
        self.tokens.append(token)
        self.finished = len(self.tokens) >= self.budget


@dataclass
class DecodingState:
    """The rows of a batch that are still in the model's input, and what the model needs to go on.

    Args:
        rows: B rows.
        input_ids: [B, t] the tokens that the cache does not hold yet.
        mask: [B, T] int64 over everything so far; the columns of finished rows get 0, so their positions stand still.
        history: [B, T] the text so far; padding is −1, −2, …, so that no n-gram of padding ever repeats.
        cache: the model's own cache object, None before the first step.
    """

    rows: list[Row]
    input_ids: Tensor
    mask: Tensor
    history: Tensor
    cache: Any = None

    @classmethod
    def of(cls, rows: list[Row], pad_id: int, device: torch.device) -> DecodingState:
        """The start of ``rows``, padded on the left."""
        width = max(len(row.prompt) for row in rows)
        pads = [width - len(row.prompt) for row in rows]
        pairs = list(zip(rows, pads, strict=True))
        return cls(
            rows,
            torch.tensor([[pad_id] * pad + list(row.prompt) for row, pad in pairs], device=device),
            torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=device),
            torch.tensor([[*range(-1, -pad - 1, -1), *row.prompt] for row, pad in pairs], device=device),
        )

    def append(self, tokens: list[int]) -> None:
        """Make ``tokens``, one a row, the next input."""
        device = self.mask.device
        self.input_ids = torch.tensor(tokens, device=device).unsqueeze(1)
        live = torch.tensor([[int(not row.finished)] for row in self.rows], device=device)
        self.mask = torch.cat([self.mask, live], dim=1)
        self.history = torch.cat([self.history, self.input_ids], dim=1)

    def compact(self) -> None:
        """Drop the finished rows once they are half of the batch, where the cache can do that."""
        keep = [i for i, row in enumerate(self.rows) if not row.finished]
        if 2 * len(keep) > len(self.rows) or not _can_select(self.cache):
            return
        indices = torch.tensor(keep, device=self.mask.device)
        self.cache.batch_select_indices(indices)
        self.input_ids, self.mask, self.history = (
            tensor[indices] for tensor in (self.input_ids, self.mask, self.history)
        )
        self.rows = [self.rows[i] for i in keep]


def _can_select(cache: Any) -> bool:
    # Asked of each layer: the method of the cache calls that of every layer, and recurrent layers have none.
    layers = getattr(cache, "layers", [])
    return bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)
