"""The interface of a source of references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deltakd.kernels import Buckets
from deltakd.types import Batch, Head


@dataclass(frozen=True)
class RoutedHeads:
    """The heads of a batch's references in parts, each with its own pair of teachers.

    Args:
        parts: tokens [n] int64, some of the batch's N valid ones, and role -> head over them, or their buckets.
            Together the parts hold each token once.
    """

    parts: tuple[tuple[Tensor, dict[str, Head] | Buckets], ...]

    @property
    def of_one_pair(self) -> dict[str, Head]:
        """The heads of a batch that one pair judges alone, in the order of its tokens."""
        [(_, heads)] = self.parts
        assert not isinstance(heads, Buckets), "only a hidden store gives heads"
        return heads


class References(Protocol):
    """Returns the head of each frozen model, or log-probs of a few tokens, for the valid tokens of a batch.

    Not an ``nn.Module``: it never enters a checkpoint or the optimiser, and changes to the student's module (training
    mode, device, precision) do not reach it.
    """

    @property
    def roles(self) -> frozenset[str]: ...

    def to(self, device: torch.device) -> None:
        """Return heads on ``device``, the student's, from now on."""
        ...

    def empty_heads(self) -> dict[str, Head]:
        """Return role -> head over no tokens: its sizes and its output embedding. Call before ``to``."""
        ...

    def start(self, batch: Batch) -> Callable[[], dict[str, Head] | Buckets | RoutedHeads]:
        """Start a call; the returned function finishes it and returns the result.

        Run the student's forward pass in between: the two can then overlap.
        """
        ...

    def __call__(self, batch: Batch) -> dict[str, Head] | Buckets | RoutedHeads:
        """Return role -> head of the valid tokens of ``batch.stream_of(role)``, in order; or buckets, or parts."""
        ...
