"""A reduced vocabulary: K tokens, and one bucket for all others that preserves their total mass exactly.

A loss runs on it unchanged, unless it says that it needs the whole vocabulary (``Loss.whole_vocabulary_reasons``).
Bucketing coarsens a distribution. By the data-processing inequality every f-divergence (the KLs, JSD, TVD, the skewed
ones) between two bucketed distributions is therefore at most the exact one, and equal to it if within the tail the two
agree up to a factor. ``tests/references/test_buckets.py`` checks values and gradients: against the plain losses with
the whole vocabulary as support, and against NumPy with few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from deltakd.kernels.blocks import row_blocks
from deltakd.kernels.head_gradients import GradientFormat
from deltakd.types import STUDENT, Loss, at_least_float32
from deltakd.types.products import Summands


@final
@dataclass(frozen=True)
class Buckets:
    """References over K tokens and one bucket for the rest of the vocabulary.

    Args:
        support: [N, K] int64, distinct token ids; the label comes first.
        log_probs: role -> [N, K + 1] log-probs at τ; the last is for all other tokens together. [N, K] if the
            support is the whole vocabulary.
        temperature: τ.
    """

    support: Tensor
    log_probs: Mapping[str, Tensor]
    temperature: float

    def __len__(self) -> int:
        return self.support.shape[0]

    @property
    def k(self) -> int:
        """The number of tokens in each support."""
        return self.support.shape[1]

    @property
    def has_tail(self) -> bool:
        """True if there are tokens outside the support."""
        return any(log_p.shape[1] > self.k for log_p in self.log_probs.values())

    def rows(self, start: int, stop: int) -> Buckets:
        """Return the buckets of tokens ``start`` to ``stop`` (exclusive)."""
        log_probs = {role: log_p[start:stop] for role, log_p in self.log_probs.items()}
        return Buckets(self.support[start:stop], log_probs, self.temperature)

    def first(self, k: int) -> Buckets:
        """Keep the first k tokens of each support; the others join the bucket."""
        if k >= self.k:
            return self
        log_probs = {
            role: torch.cat([log_p[:, :k], log_p[:, k:].logsumexp(-1, keepdim=True)], dim=1)
            for role, log_p in self.log_probs.items()
        }
        return Buckets(self.support[:, :k], log_probs, self.temperature)

    def cast(self, dtype: torch.dtype) -> Buckets:
        """Return the same buckets with log-probs in another dtype."""
        return Buckets(
            self.support, {role: log_p.to(dtype) for role, log_p in self.log_probs.items()}, self.temperature
        )


@final
class BucketLogits(Mapping[str, Tensor]):
    """Stands in for logits: [N, K + 1] by role; labels are then positions in the support.

    The values are τ times log-probs at τ, so a loss that divides by τ gets the bucketed distributions at τ. The
    student's cross-entropy is at τ = 1; if τ differs, a loss must call ``cross_entropy`` for it.

    Args:
        kept: [N, K] the student's logits on the support.
        tail: [N] τ · logsumexp(z / τ) of the student over all other tokens; None if there are none.
        tail_at_one: [N] the tails at τ = 1.
        buckets: those of the references.
    """

    def __init__(self, kept: Tensor, tail: Tensor | None, tail_at_one: Tensor | None, buckets: Buckets) -> None:
        self._at_one = _joined(kept, tail_at_one)
        self._logits = {STUDENT: _joined(kept, tail)}
        for role, log_p in buckets.log_probs.items():
            # Log-probs are stored in few bits; compute in the student's dtype.
            self._logits[role] = at_least_float32(log_p).to(kept.dtype) * buckets.temperature

    def __getitem__(self, role: str) -> Tensor:
        return self._logits[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._logits)

    def __len__(self) -> int:
        return len(self._logits)

    def cross_entropy(self, labels: Tensor) -> Tensor:
        """Return −log softmax(z_student)[label] over the whole vocabulary at τ = 1: [N] nats, exact.

        Args:
            labels: [N] int64, positions in the support.
        """
        return F.cross_entropy(self._at_one, labels, reduction="none")


def _joined(kept: Tensor, tail: Tensor | None) -> Tensor:
    return kept if tail is None else torch.cat([kept, tail[:, None]], dim=1)


@torch.no_grad()
def bucketed_chunk(
    loss: Loss, z_NV: Tensor, buckets: Buckets, wants_gradient: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Compute a loss of n tokens over buckets, and its gradient w.r.t. the student's logits over the whole vocabulary.

    Args:
        loss: the loss.
        z_NV: [n, V] the student's logits, at least float32, without a graph; overwritten.
        buckets: those of the references, over the same tokens.
        wants_gradient: True to compute the gradient.

    Returns:
        ``loss`` and its parts, [n] nats each, detached; and the gradient of the summed loss [n, V], or None.
    """
    tau = buckets.temperature
    leaves = [z_NV.gather(1, buckets.support)]
    shares: list[Tensor] = []
    if buckets.has_tail:
        # Sum the bucket over its own tokens: all − kept would cancel if the bucket is small.
        z_NV.scatter_(1, buckets.support, -torch.inf)
        for temperature in [1.0] if tau == 1.0 else [tau, 1.0]:
            tail_N, share_NV = _log_sum(z_NV, temperature, in_place=temperature == 1.0)
            leaves.append(tail_N)
            shares.append(share_NV)
    values, gradients = _by_leaves(loss, leaves, buckets, wants_gradient)
    return values, None if gradients is None else _spread(gradients, shares, buckets.support, z_NV)


@torch.no_grad()
def triton_bucketed_chunk(
    loss: Loss, z_NV: Tensor, buckets: Buckets, gradients: GradientFormat | None, softcap: float | None
) -> tuple[dict[str, Tensor], Summands]:
    """Do the same with Triton kernels (``deltakd.kernels.gpu``).

    Args:
        loss, z_NV, buckets: as for ``bucketed_chunk``.
        gradients: how the gradient is multiplied; None: it is not wanted.
        softcap: the bound of the soft-capping that ``z_NV`` has had.

    Returns:
        ``loss`` and its parts, and the summands of the gradient w.r.t. the logits before soft-capping.
    """
    # Triton is imported where it is used: not every machine has it.
    from deltakd.kernels.gpu import tails as kernels

    kept_NK, tails = z_NV.gather(1, buckets.support), []
    z_NV.scatter_(1, buckets.support, -torch.inf)
    if buckets.has_tail:
        tails = kernels.tail_rows(z_NV, buckets.temperature)
    values, found = _by_leaves(loss, [kept_NK, *tails], buckets, gradients is not None)
    if gradients is None or found is None:
        return values, ()
    kept_grad_NK, *grads = (
        # Autograd may return one number, expanded.
        torch.zeros_like(leaf) if gradient is None else gradient.contiguous()
        for gradient, leaf in zip(found, (kept_NK, *tails), strict=True)
    )
    in_place = gradients.dtype == z_NV.dtype
    summands = (z_NV,) if in_place else tuple(gradients.empty(z_NV) for _ in range(gradients.count))
    if tails:
        kernels.spread_rows(z_NV, tails, grads, buckets.temperature, summands, gradients.scale, softcap)
    else:
        for summand in summands:
            summand.zero_()
    if softcap is not None:
        kept_grad_NK = kept_grad_NK * (1.0 - (kept_NK.detach() / softcap).square())
    for summand, kept in zip(summands, gradients.summands(kept_grad_NK), strict=True):
        summand.scatter_(1, buckets.support, kept)
    return values, summands


def _by_leaves(
    loss: Loss, leaves: list[Tensor], buckets: Buckets, wants_gradient: bool
) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...] | list[None] | None]:
    """Return ``loss`` and its parts, and the gradients w.r.t. kept logits and tails; None if they are not wanted."""
    with torch.set_grad_enabled(wants_gradient):
        for leaf in leaves:
            leaf.requires_grad_(wants_gradient)
        tails = leaves[1:]
        logits = BucketLogits(leaves[0], tails[0] if tails else None, tails[-1] if tails else None, buckets)
        output = loss(logits, torch.zeros(len(leaves[0]), dtype=torch.int64, device=leaves[0].device))
        total = output.per_token.sum()
    values = {name: value_N.detach() for name, value_N in {**output.parts, "loss": output.per_token}.items()}
    if not wants_gradient:
        return values, None
    return values, (
        torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    )


def _log_sum(z_NV: Tensor, temperature: float, in_place: bool) -> tuple[Tensor, Tensor]:
    """Return τ · logsumexp(z / τ), [n], and its gradient softmax(z / τ), [n, V]."""
    share_NV = z_NV if in_place else z_NV.clone()
    log_sum_N = torch.empty_like(z_NV[:, 0])
    for rows in row_blocks(z_NV):
        block = share_NV[rows]
        if temperature != 1.0:
            block.div_(temperature)
        largest = block.amax(-1, keepdim=True)
        total = block.sub_(largest).exp_().sum(-1, keepdim=True)
        block.div_(total)
        log_sum_N[rows] = temperature * (largest + total.log()).squeeze(-1)
    return log_sum_N, share_NV


def _spread(
    gradients: tuple[Tensor | None, ...] | list[None], shares: list[Tensor], support: Tensor, z_NV: Tensor
) -> Tensor:
    """Return the gradient w.r.t. all logits [n, V], from those w.r.t. kept logits and tails; overwrites ``shares``."""
    total_NV: Tensor | None = None
    for gradient_N, share_NV in zip(gradients[1:], shares, strict=True):
        if gradient_N is not None:
            share_NV.mul_(gradient_N[:, None])
            total_NV = share_NV if total_NV is None else total_NV.add_(share_NV)
    if total_NV is None:
        total_NV = torch.zeros_like(z_NV)
    kept = gradients[0]
    # Shares are 0 on the support.
    return total_NV if kept is None else total_NV.scatter_(1, support, kept)
