"""What a source of references is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from deltakd.kernels import Buckets
from deltakd.types import Batch, Head


class References(Protocol):
    """Gives the head of each frozen model, or log-probs of a few tokens, for the valid tokens of a batch.

    It is never part of a checkpoint nor of the optimiser, and nothing that is done to the student's module (training
    mode, device, precision) reaches it.
    """

    @property
    def roles(self) -> frozenset[str]:
        """The roles it can give."""
        ...

    def to(self, device: torch.device) -> None:
        """The student is now on ``device``; heads are to be given there."""
        ...

    def start(self, batch: Batch) -> Callable[[], dict[str, Head] | Buckets]:
        """As a call, in two steps: what can run while the student runs is done by the returned function."""
        ...

    def __call__(self, batch: Batch) -> dict[str, Head] | Buckets:
        """Role -> head of the batch's N valid tokens, in the order of ``batch.labels_N``; or buckets of them."""
        ...
