"""The optimiser and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Len, Lt
from torch import nn

#: Schedules that need no options. Others are checked by building them with transformers, which takes seconds to import.
PLAIN_SCHEDULES = (
    "cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial", "cosine_with_restarts",
)  # fmt: skip


@dataclass(frozen=True)
class AdamW:
    """AdamW with warm-up and a schedule; no weight decay on biases and norms.

    Args:
        lr: peak learning rate.
        weight_decay: on matrices (embeddings too), not on vectors.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        schedule: a name for transformers' ``get_scheduler``: cosine, linear, constant_with_warmup, ...
        schedule_options: options of that schedule, such as ``min_lr_rate`` for cosine_with_min_lr.
        warmup_steps: optimiser steps from 0 to ``lr``; a number below 1 is a fraction of all steps.
        half_weights: how updates reach bfloat16 and float16 weights. ``nearest``: PyTorch's AdamW; small ones are
            rounded away. ``masters``: a float32 copy of each weight is updated, and the weight is its rounding.
            ``stochastic`` (bfloat16): rounded up or down at random, right on average. Moments are then in float32, too.
    """

    lr: Annotated[float, Gt(0)] = 5e-4
    weight_decay: Annotated[float, Ge(0)] = 0.01
    betas: Annotated[Sequence[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)] = (0.9, 0.999)
    eps: Annotated[float, Gt(0)] = 1e-8
    schedule: str = "cosine"
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    warmup_steps: Annotated[float, Ge(0)] = 0
    half_weights: Literal["nearest", "masters", "stochastic"] = "nearest"

    def problems(self) -> list[str]:
        """Return the problems with ``optim``, one sentence each."""
        if self.schedule in PLAIN_SCHEDULES and not self.schedule_options:
            return []
        try:
            self._scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 1, 10)
        except (ValueError, TypeError) as error:
            return [
                f"optim.schedule={self.schedule} with optim.schedule_options={dict(self.schedule_options)}: {error}"
            ]
        return []

    def _scheduler(self, optimizer: torch.optim.Optimizer, warmup: int, total_steps: int) -> Any:
        from transformers import get_scheduler

        return get_scheduler(self.schedule, optimizer, warmup, total_steps, dict(self.schedule_options))

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the trained matrices, and the trained vectors, with their weight decay."""
        trainable = [p for p in model.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]

    def build(
        self,
        model: nn.Module,
        total_steps: int,
        kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
        seed: int = 0,
        loss_part: nn.Module | None = None,
        loss_lr: float | None = None,
        fused: bool = False,
    ) -> tuple[torch.optim.Optimizer, Any]:
        """Return the optimiser over the trainable parameters, and its scheduler, stepped once per optimiser step.

        Args:
            model: the student.
            total_steps: optimiser steps in the whole run.
            kind: an implementation of AdamW with PyTorch's arguments; for ``half_weights=nearest``.
            seed: of the noise of stochastic rounding.
            loss_part: the trained part of the loss.
            loss_lr: its peak learning rate; None: the student's.
            fused: update in one pass over the weights, which PyTorch's AdamW can; for ``half_weights=nearest``.
        """
        groups = self._groups(model)
        if loss_part is not None:
            groups += [{**group, "lr": loss_lr or self.lr} for group in self._groups(loss_part)]
        options: dict[str, Any] = {"lr": self.lr, "betas": (self.betas[0], self.betas[1]), "eps": self.eps}
        given = [group for group in groups if group["params"]]
        if self.half_weights == "nearest":
            optimizer = kind(given, **(options | {"fused": True} if fused else options))
        else:
            # With DTensor, which a run of float32 weights need not import.
            from deltakd.training.half_precision import HalfPrecisionAdamW

            optimizer = HalfPrecisionAdamW(given, **options, half_weights=self.half_weights, seed=seed)
        warmup = self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * total_steps
        return optimizer, self._scheduler(optimizer, round(warmup), total_steps)
