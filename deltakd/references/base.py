"""The contract of a source of references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from deltakd.kernels import Buckets
from deltakd.types import Batch, Head


class References(Protocol):
    """Gives the head of each frozen model, or log-probs of a few tokens, for the valid tokens of a batch.

    It is no ``nn.Module``: never part of a checkpoint or of the optimiser, and nothing that is done to the student's
    module (training mode, device, precision) reaches it.
    """

    @property
    def roles(self) -> frozenset[str]:
        """The roles it can give."""
        ...

    def to(self, device: torch.device) -> None:
        """Give heads on ``device`` from now on: the student is there."""
        ...

    def start(self, batch: Batch) -> Callable[[], dict[str, Head] | Buckets]:
        """As a call, in two phases: what can run beside the student is left to the returned function.

        The student's forward pass belongs between the two.
        """
        ...

    def __call__(self, batch: Batch) -> dict[str, Head] | Buckets:
        """Return role -> head of the batch's N valid tokens, in the order of ``batch.labels_N``; or buckets of them."""
        ...
