"""Numbers of an optimiser step, read by the host only once the device has computed them anyway."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from deltakd.distributed.sharding import gathered
from deltakd.io.errors import NonFiniteLossError


@final
class HostCopy:
    """A copy of a device's numbers, on its way to the host.

    Making it never waits. ``read`` waits for the work that was queued before it was made, not for later work.

    Args:
        values: [n] floating point.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """Return the numbers."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values


@dataclass
class StepSums:
    """What this rank adds up over the micro-batches of an optimiser step; nothing is read from the device.

    Args:
        shares: name -> scalar, the sums of the loss and its parts, each divided by the step's valid tokens.
        losses: each micro-batch's share of the loss.
        row_ids: each micro-batch's rows, on the CPU.
    """

    shares: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    row_ids: list[Tensor] = field(default_factory=list)

    def add(self, shares: Mapping[str, Tensor], row_ids: Tensor) -> None:
        """Add a micro-batch; ``shares`` has ``loss`` and the loss's parts."""
        for name, share in shares.items():
            self.shares[name] = self.shares[name] + share if name in self.shares else share
        self.losses.append(shares["loss"])
        self.row_ids.append(row_ids)


@final
class StepReading:
    """Loss, parts and gradient norm of an optimiser step, over all ranks.

    Collective: make it on every rank.

    Args:
        step: the optimiser step, from 0.
        sums: of this rank.
        norm: the gradient's norm over all ranks, a scalar; None: nobody knows it yet.
        reduce: sums a tensor over the ranks.
    """

    def __init__(self, step: int, sums: StepSums, norm: Tensor | None, reduce: Callable[[Tensor], Tensor]) -> None:
        self.step = step
        self._row_ids = sums.row_ids
        self._names = list(sums.shares)
        wide = torch.float64 if sums.losses[0].dtype == torch.float64 else torch.float32
        total = reduce(torch.stack([share.detach().to(wide) for share in sums.shares.values()]))
        #: The loss over all ranks, a scalar on the device.
        self.loss = total[self._names.index("loss")]
        own = [value.detach().to(wide) for value in (*sums.losses, *([] if norm is None else [norm]))]
        self._has_norm = norm is not None
        self._copy = HostCopy(torch.cat([total, torch.stack(own)]))
        #: What the host knows already, such as the learning rate.
        self.known: dict[str, float] = {}
        self._own: list[float] = []
        self._read: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """Return the loss, its parts, ``grad_norm`` and what is known; waits until the device has computed them."""
        if not self._read:
            values = self._copy.read()
            parts, self._own = values[: len(self._names)], values[len(self._names) :]
            norm = self._own.pop() if self._has_norm else math.nan
            self._read = {**dict(zip(self._names, parts, strict=True)), "grad_norm": norm}
        return self._read | self.known

    def check(self, skips_bad_gradients: bool = False) -> None:
        """Raise a NonFiniteLossError, on every rank, if the loss or the gradient is not finite.

        Collective in that case: call on every rank.

        Args:
            skips_bad_gradients: True if the optimiser itself skips a step whose gradient is not finite.
        """
        metrics = self.metrics()
        if not math.isfinite(metrics["loss"]):
            bad = [rows for share, rows in zip(self._own, self._row_ids, strict=True) if not math.isfinite(share)]
            named = [row for part in gathered(_listed(bad)) for row in part]
            raise _non_finite("loss", metrics["loss"], self.step, named or _listed(self._row_ids))
        if self._has_norm and not math.isfinite(metrics["grad_norm"]) and not skips_bad_gradients:
            raise _non_finite("gradient's norm", metrics["grad_norm"], self.step, _listed(self._row_ids))

    def add_norm(self, norm: float) -> None:
        """Set the gradient's norm, where only the optimiser's step tells it."""
        self.metrics()
        self._read["grad_norm"] = norm
        self._has_norm = True


def _listed(row_ids: Sequence[Tensor]) -> list[int]:
    return [row for rows in row_ids for row in rows.tolist()]


def _non_finite(what: str, value: float, step: int, row_ids: list[int]) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"the {what} is {value} at optimiser step {step}, rows {row_ids} of the training set; "
        "the last good checkpoint is kept. Lower optim.lr, raise optim.warmup_steps, or look at those rows"
    )
