"""The LightningModule: one training step for every loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from deltakd.distributed.sharding import Shell, gathered, gradient_norm, is_sharded, whole_parameters
from deltakd.distributed.strategies import loss_factor, optimizer_class
from deltakd.distributed.zero import ZeroStrategy
from deltakd.io.errors import NonFiniteLossError
from deltakd.kernels import MEMORY_BUDGET, Buckets, chunked_loss
from deltakd.models import LanguageModel, transformer_blocks
from deltakd.references import References
from deltakd.training.optim import AdamW
from deltakd.types import STUDENT, Batch, Head, Loss, Progress


@dataclass
class _StepSums:
    """What the micro-batches of the current optimiser step have added up to, on this rank."""

    loss: Tensor | float = 0.0
    parts: dict[str, Tensor] = field(default_factory=dict)
    row_ids: list[int] = field(default_factory=list)

    def add(self, loss: Tensor, parts: dict[str, Tensor], row_ids: list[int]) -> None:
        self.row_ids += row_ids
        self.loss = self.loss + loss.detach()
        for name, value in parts.items():
            self.parts[name] = self.parts[name] + value if name in self.parts else value


@final
class DistillationModule(L.LightningModule):
    """Bundles the student, its references and the loss.

    Args:
        student: the model to train.
        references: the frozen models, or None for a loss that reads none. They are no submodule: not in the
            checkpoint, not in the optimiser, untouched by ``train()``.
        loss: the loss plug-in.
        optim: optimiser and schedule.
        total_steps: optimiser steps of the whole run.
        seed: with the number of the micro-batch it draws the student's dropout.
        memory_budget: MiB for a chunk of logits and all that is made of them.
        will_be_sharded: whether the strategy leaves no rank a whole student.
    """

    def __init__(
        self,
        student: LanguageModel,
        references: References | None,
        loss: Loss,
        optim: AdamW,
        total_steps: int,
        seed: int,
        memory_budget: float = MEMORY_BUDGET,
        will_be_sharded: bool = False,
    ) -> None:
        super().__init__()
        # from_pretrained returns eval mode, and Lightning leaves models in the mode in which they arrive.
        self.student = student.train()
        self.references = references
        self.loss = loss
        self.optim = optim
        self.total_steps = total_steps
        self.seed = seed
        self.memory_budget = memory_budget
        # DeepSpeed's checkpoints hold what is trained alone; frozen weights come from their source.
        self.strict_loading = all(p.requires_grad for p in student.parameters())
        self.shell = Shell(student) if will_be_sharded else None
        #: ``train/...`` of the last whole optimiser step, over all ranks.
        self.step_metrics: dict[str, float] = {}
        self._sums = _StepSums()
        self._batch_idx = 0
        #: Rows of the optimiser step at work, on this rank.
        self._row_ids: list[int] = []

    def configure_model(self) -> None:
        """Shard the student where the strategy is FSDP2: each block by itself, the rest around them."""
        if self.device_mesh is None or is_sharded(self.student):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in transformer_blocks(self.student):
            fully_shard(block, mesh=mesh)
        fully_shard(self.student, mesh=mesh)

    @contextmanager
    def whole_student(self) -> Iterator[LanguageModel]:
        """The student as a model that this rank can run by itself, in eval mode; a joint act of all ranks."""
        if self.shell is not None:
            with self.shell.filled(self.student) as student:
                yield student
        else:
            was_training = self.student.training
            yield self.student.eval()
            self.student.train(was_training)

    def whole_state(self) -> dict[str, Tensor]:
        """What a checkpoint of the student alone holds, on the CPU; a joint act of all ranks."""
        if self.shell is not None:
            return {f"student.{name}": value.cpu() for name, value in whole_parameters(self.student)}
        return self._kept(self.state_dict())

    def _kept(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.student.quantized:
            return state
        # Its frozen weights come from their source, and packed ones can't be loaded from a state dict.
        trained = {f"student.{name}" for name, p in self.student.named_parameters() if p.requires_grad}
        return {k: v for k, v in state.items() if k in trained}

    def on_fit_start(self) -> None:
        """Let the references follow the student to its device."""
        if self.references is not None:
            self.references.to(self.device)

    def loss_of(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss and of its parts over the batch's valid tokens (nats)."""
        references = None if self.references is None else self.references.start(batch)

        def use(student: Head) -> tuple[Tensor, dict[str, Tensor]]:
            given = {} if references is None else references()
            buckets = given if isinstance(given, Buckets) else None
            heads = {} if isinstance(given, Buckets) else dict(given)
            heads[STUDENT] = student
            return chunked_loss(self.loss, heads, batch.labels_N, memory_budget=self.memory_budget, buckets=buckets)

        return self.student.with_head(batch, use)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch: its summed loss over the valid tokens of the *whole* optimiser step.

        Raises:
            NonFiniteLossError: naming the step and the rows.
        """
        assert batch.step == self.global_step, f"batch of step {batch.step} arrived at step {self.global_step}"
        # Dropout depends on the micro-batch alone, so that a resumed run draws what an uninterrupted one would.
        self._batch_idx = batch_idx
        torch.manual_seed(_mix(self.seed, batch_idx, self.global_rank))
        total, parts = self.loss_of(batch)
        share = total / batch.step_tokens
        # Of many ranks one alone may not leave the others: they all raise together at the end of the step.
        if self.trainer.world_size == 1 and not torch.isfinite(share):
            raise _non_finite("loss", share.item(), batch.step, batch.row_ids.tolist())
        shares = {name: value / batch.step_tokens for name, value in parts.items()}
        self._sums.add(share, shares, batch.row_ids.tolist())
        return share * loss_factor(self.trainer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gather what is to be logged of this optimiser step; the gradient's norm is that before clipping.

        Raises:
            NonFiniteLossError: the gradient is not finite, though the loss is; the weights are untouched yet.
        """
        if not self._ends_step:
            return  # DeepSpeed is asked for a step after every micro-batch, and knows by itself which ones count
        norm = gradient_norm(self.student)
        self._row_ids = self._sums.row_ids
        # Each rank holds its share over the same denominator: the sum over ranks is the loss of the step.
        sums = {"loss": torch.as_tensor(self._sums.loss)} | self._sums.parts
        self._sums = _StepSums()
        if self.trainer.world_size > 1:
            own = float(sums["loss"])
            sums = {name: self.trainer.strategy.reduce(value, reduce_op="sum") for name, value in sums.items()}
            if not math.isfinite(float(sums["loss"])):
                rows = gathered([] if math.isfinite(own) else self._row_ids)
                raise _non_finite("loss", float(sums["loss"]), self.global_step, [row for part in rows for row in part])
        if norm is not None:
            self._check_norm(norm)
        self.step_metrics = {f"train/{name}": float(value) for name, value in sums.items()} | {
            "train/grad_norm": math.nan if norm is None else norm,
            "train/lr": optimizer.param_groups[0]["lr"],
        }
        # Here and not after the optimiser's step: checkpoints are written there, and must hold the moved schedules.
        progress = Progress(self.global_step + 1, self.total_steps)
        for name, schedule in self.loss.schedules.items():
            self.step_metrics[f"train/{name}"] = schedule.value
            schedule.on_step(progress, self.step_metrics["train/loss"])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As inherited; then the gradient's norm, where DeepSpeed alone knows it.

        Raises:
            NonFiniteLossError: it is not finite; the weights are spoilt, but nothing was saved since.
        """
        super().optimizer_step(*args, **kwargs)
        strategy = self.trainer.strategy
        if isinstance(strategy, ZeroStrategy) and self._ends_step:
            self.step_metrics["train/grad_norm"] = strategy.norm_of_last_step()
            self._check_norm(self.step_metrics["train/grad_norm"])

    @property
    def _ends_step(self) -> bool:
        """Whether the micro-batch at work is the last of its optimiser step."""
        return (self._batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    def _check_norm(self, norm: float) -> None:
        # In 16-mixed the scaler, which DeepSpeed has in its engine, skips such steps by itself and lowers its scale.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None or (
            isinstance(self.trainer.strategy, ZeroStrategy) and str(self.trainer.precision).startswith("16")
        )
        if not math.isfinite(norm) and not scaled:
            raise _non_finite("gradient's norm", norm, self.global_step, self._row_ids)

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepped per optimiser step."""
        kind = optimizer_class(self.trainer.strategy)
        optimizer, scheduler = self.optim.build(self.student, self.total_steps, kind)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the last step's metrics (its loss is the result of a run without validation data) and the schedules."""
        checkpoint["state_dict"] = self._kept(checkpoint["state_dict"])
        checkpoint["step_metrics"] = self.step_metrics
        checkpoint["schedules"] = {name: s.state_dict() for name, s in self.loss.schedules.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        self.step_metrics = checkpoint["step_metrics"]
        for name, schedule in self.loss.schedules.items():
            schedule.load_state_dict(checkpoint["schedules"][name])

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Batches know how to move themselves."""
        return batch.to(device, non_blocking=True)


def _non_finite(what: str, value: float, step: int, row_ids: list[int]) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"the {what} is {value} at optimiser step {step}, rows {row_ids} of the training set; "
        "the last good checkpoint is kept. Lower optim.lr, raise optim.warmup_steps, or look at those rows"
    )


def _mix(seed: int, micro_batch: int, rank: int) -> int:
    """A 63-bit seed from three small numbers (SplitMix64's finaliser, so that neighbours are unrelated)."""
    z = (seed * 0x9E3779B97F4A7C15 + micro_batch * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return (z ^ (z >> 31)) >> 1
