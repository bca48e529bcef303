"""A micro-batch, and where its valid tokens are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from deltakd.types.heads import TokenFacts

#: The label of a position that is not trained on (prompt, padding).
IGNORE_INDEX = -100


@dataclass
class Batch:
    """Rows of one micro-batch, padded on the right.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 1 on real tokens.
        labels: [B, T] int64; the token itself where it is trained on, else IGNORE_INDEX. Not shifted: position t
            is predicted from the hidden state at t − 1.
        row_ids: [B] int64, the row's number in its data set; stays on the CPU.
        step: the optimiser step (from 0) that this micro-batch belongs to.
        step_tokens: valid tokens in that whole optimiser step, over all ranks and micro-batches.
        sampled_log_probs: [B, T] float32 nats: each label's log-prob when an earlier student sampled it, 0 elsewhere;
            None: as for ``TokenFacts``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    row_ids: Tensor
    step: int
    step_tokens: int
    sampled_log_probs: Tensor | None = None
    _valid: Tensor | None = None
    _real: int | None = None

    @property
    def real_positions(self) -> int:
        """Number of positions that are no padding; like ``valid_N`` counted once, before the batch moves."""
        if self._real is None:
            self._real = int(self.attention_mask.sum())
        return self._real

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
    def facts_N(self) -> TokenFacts:
        """Facts about the N valid tokens: their rows, and their log-probs at sampling time."""
        sampled = None if self.sampled_log_probs is None else self.sampled_log_probs.flatten()[self.valid_N + 1]
        return TokenFacts(self.valid_N // self.labels.shape[1], sampled)

    def at_valid(self, values_BTD: Tensor) -> Tensor:
        """Return [N, D], the values at the positions that predict the valid tokens."""
        return values_BTD.flatten(0, 1)[self.valid_N]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on ``device``, all but ``row_ids``."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> Batch:
        """Return the batch in page-locked memory, from which a GPU copies while the CPU goes on."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with its tensors changed, all but ``row_ids``; what the host reads is found first."""
        self._valid, self._real = self.valid_N, self.real_positions
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "row_ids"}
        moved: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)
