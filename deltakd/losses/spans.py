"""What losses of two tokenizers share: spans of a chunk, sums over them, and sorted probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deltakd.types import AlignedLogits, AlignedTokens, Alignment


@dataclass(frozen=True)
class Side:
    """The K spans of a chunk on one side.

    Args:
        start, stop: [K] int64: where the tokens of each span start and stop.
        lengths: [K] int64 on the CPU: their tokens.
    """

    start: Tensor
    stop: Tensor
    lengths: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest span."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    def longer_than(self, tokens: int) -> Tensor:
        """Return the spans with more tokens: int64 indices into K."""
        return torch.where(self.lengths > tokens)[0].to(self.start.device, non_blocking=True)

    def sums(self, values_N: Tensor, skip_first: bool = False, skip_last: bool = False) -> Tensor:
        """Return each span's sum over its tokens, or all but the first or the last: [K].

        Sums of up to ``longest`` gathered values: differentiable, and the same in every run on a GPU, too.
        """
        start, stop = self.start + int(skip_first), self.stop - int(skip_last)
        total_K = values_N.new_zeros(len(self.start))
        for offset in range(self.longest - skip_first - skip_last):
            place_K = start + offset
            inside_K = place_K < stop
            total_K = total_K + values_N[torch.where(inside_K, place_K, 0)].masked_fill(~inside_K, 0.0)
        return total_K


def sides_of(alignment: Alignment) -> tuple[Side, Side]:
    """Return the spans among the student's tokens, and among the other side's."""
    borders, device = alignment.borders, alignment.student_spans.device
    there = borders.to(device, non_blocking=True)
    return Side(there[:, 0], there[:, 1], borders[:, 1] - borders[:, 0]), Side(
        there[:, 2], there[:, 3], borders[:, 3] - borders[:, 2]
    )


def tokens_of(logits: Mapping[str, Tensor]) -> AlignedTokens:
    """Return the tokens that come with the logits.

    Raises:
        ValueError: they are plain logits, which say nothing of a second tokenizer.
    """
    if not isinstance(logits, AlignedLogits):
        raise ValueError(
            "a loss of two tokenizers reads deltakd.types.AlignedLogits: call deltakd.kernels.aligned_loss"
        )
    return logits.tokens


def at_last_tokens(values_K: Tensor, side: Side, count: int) -> Tensor:
    """Lay each span's value on its last token: [count], 0 elsewhere."""
    return values_K.new_zeros(count).scatter(0, side.stop - 1, values_K)


def sorted_distance(p_KV: Tensor, q_KV: Tensor) -> Tensor:
    """Σ_i |p_(i) − q_(i)| over the values in descending order, the shorter side filled up with zeros: [K].

    Args:
        p_KV: [K, V] of one vocabulary.
        q_KV: [K, V'] of another.
    """
    p_KV, q_KV = (side_KV.sort(-1, descending=True).values for side_KV in (p_KV, q_KV))
    missing = p_KV.shape[-1] - q_KV.shape[-1]
    return (F.pad(p_KV, (0, max(0, -missing))) - F.pad(q_KV, (0, max(0, missing)))).abs().sum(-1)
