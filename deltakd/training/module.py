"""The LightningModule: one training step for every loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import lightning as L
import torch
from torch import Tensor, nn

from deltakd.data.batches.data_module import DistillationData
from deltakd.distributed.sharding import (
    Shell,
    gathered,
    gradient_norm,
    is_sharded,
    shard_by_blocks,
    whole_parameters,
)
from deltakd.distributed.strategies import loss_factor, optimizer_class
from deltakd.distributed.zero import ZeroStrategy
from deltakd.io.errors import NonFiniteLossError
from deltakd.kernels import MEMORY_BUDGET
from deltakd.models import LanguageModel
from deltakd.references import References
from deltakd.training.half_precision import rounding_warning
from deltakd.training.optim import AdamW
from deltakd.training.step import DistillationStep
from deltakd.types import Batch, Loss, Progress, TokenMap

log = logging.getLogger(__name__)


@final
class DistillationModule(L.LightningModule):
    """Trains a student with a loss, with or without references; any ``lightning.Trainer`` can fit it.

    Args:
        student: the model to train.
        references: the frozen models, or None for a loss that reads none.
        loss: the loss plug-in.
        optim: optimiser and schedule.
        total_steps: optimiser steps in the whole run.
        seed: seeds the student's dropout, together with the micro-batch number and the rank.
        memory_budget: MiB for a chunk of logits and everything computed from them.
        will_be_sharded: True if no rank will hold the whole student.
        token_map: of the student's vocabulary and the teachers'; None: they share one.
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
        token_map: TokenMap | None = None,
    ) -> None:
        super().__init__()
        # from_pretrained returns models in eval mode, and Lightning keeps the mode.
        self.step = DistillationStep(student.train(), references, loss, memory_budget, token_map)
        self.optim = optim
        self.total_steps = total_steps
        self.seed = seed
        # DeepSpeed's checkpoints hold only trained weights; frozen ones come from their source.
        self.strict_loading = all(p.requires_grad for p in student.parameters())
        self.shell = Shell(student) if will_be_sharded else None
        #: ``train/...`` of the last whole optimiser step, over all ranks.
        self.step_metrics: dict[str, float] = {}
        #: For the current optimiser step on this rank: sums of the loss and its parts over micro-batches, and the rows.
        self._sums: dict[str, Tensor] = {}
        self._row_ids: list[int] = []
        self._batch_idx = 0

    @property
    def student(self) -> LanguageModel:
        """The model being trained; this rank's shard if it is sharded."""
        return self.step.student

    def configure_model(self) -> None:
        """Shard the step if the strategy is FSDP2."""
        if self.device_mesh is not None and not is_sharded(self.step):
            shard_by_blocks(self.step, self.device_mesh["data_parallel"])

    @contextmanager
    def whole_student(self) -> Iterator[LanguageModel]:
        """Yield the student in eval mode, as a model that this rank can run alone.

        Collective: call on every rank.
        """
        if self.shell is not None:
            with self.shell.filled(self.student) as student:
                yield student
        else:
            was_training = self.student.training
            yield self.student.eval()
            self.student.train(was_training)

    def whole_state(self) -> dict[str, Tensor]:
        """Return the step's state with the whole student, on the CPU if it is sharded.

        Collective: call on every rank.
        """
        if self.shell is not None:
            return {name: value.cpu() for name, value in whole_parameters(self.step)}
        return self._kept(self.step, self.step.state_dict())

    def _kept(self, module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the entries of a module's state that a checkpoint keeps."""
        if not self.student.quantized:
            return state
        # Frozen weights come from their source, and packed ones can't be loaded from a state dict.
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        return {name: value for name, value in state.items() if name in trained}

    def on_fit_start(self) -> None:
        """Move the references to the student's device.

        Raises:
            ValueError: the trainer would split the micro-batches into different steps than the data module.
        """
        self._check_trainer()
        if self.step.references is not None:
            self.step.references.to(self.device)

    def _check_trainer(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DistillationData):
            return
        given, wanted = self.trainer.accumulate_grad_batches, data.accumulate
        if given != wanted:
            raise ValueError(
                f"the trainer's accumulate_grad_batches is {given}, but the data module's is {wanted}; give the "
                "trainer run.trainer_options"
            )
        if self.trainer.max_epochs != 1:
            raise ValueError(
                f"the trainer's max_epochs is {self.trainer.max_epochs}; give 1: the data module hands out the whole "
                "run as one epoch, and max_epochs or max_steps of `prepare` say how long it is"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return a micro-batch's summed loss, divided by the valid tokens of the *whole* optimiser step.

        Raises:
            NonFiniteLossError: names the step and the rows.
        """
        assert batch.step == self.global_step, f"batch of step {batch.step} arrived at step {self.global_step}"
        # Dropout depends only on seed, micro-batch and rank, so that a resumed run draws the same.
        torch.manual_seed(_mix(self.seed, batch_idx, self.global_rank))
        total, parts = self.step(batch)
        share = total / batch.step_tokens
        # With several ranks, all raise together at the end of the step: a single one would leave the others waiting.
        if self.trainer.world_size == 1 and not torch.isfinite(share):
            raise _non_finite("loss", share.item(), batch.step, batch.row_ids.tolist())
        shares = {name: value / batch.step_tokens for name, value in parts.items()}
        self._add({"loss": share.detach()} | shares, batch.row_ids.tolist(), batch_idx)
        return share * loss_factor(self.trainer)

    def _add(self, shares: dict[str, Tensor], row_ids: list[int], batch_idx: int) -> None:
        """Add a micro-batch to the sums of its optimiser step."""
        self._batch_idx = batch_idx
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._sums, self._row_ids = {}, []
        self._row_ids += row_ids
        for name, share in shares.items():
            self._sums[name] = self._sums[name] + share if name in self._sums else share

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Collect the metrics of this optimiser step, with the gradient norm before clipping; move the schedules.

        Raises:
            NonFiniteLossError: the loss or the gradient is not finite; the weights are still unchanged.
        """
        if not self._ends_step:
            return  # Lightning calls DeepSpeed's step after every micro-batch; DeepSpeed knows which ones count
        norm = gradient_norm(self.step)
        sums = self._summed_over_ranks()
        if norm is not None:
            self._check_norm(norm)
        self.step_metrics = {f"train/{name}": value for name, value in sums.items()} | {
            "train/grad_norm": math.nan if norm is None else norm,
            "train/lr": optimizer.param_groups[0]["lr"],
        }
        # Here, not after the optimiser's step: checkpoints written there must hold the moved schedules.
        progress = Progress(self.global_step + 1, self.total_steps)
        for name, schedule in self.step.loss.schedules.items():
            self.step_metrics[f"train/{name}"] = schedule.value
            schedule.on_step(progress, self.step_metrics["train/loss"])

    def _summed_over_ranks(self) -> dict[str, float]:
        """Return the optimiser step's loss and parts, the sums of all ranks' shares over the same denominator.

        Raises:
            NonFiniteLossError: on every rank; names the rows of the ranks whose loss is not finite.
        """
        if self.trainer.world_size == 1:
            return {name: float(value) for name, value in self._sums.items()}
        reduce = self.trainer.strategy.reduce
        own = float(self._sums["loss"])
        sums = {name: float(reduce(value, reduce_op="sum")) for name, value in self._sums.items()}
        if not math.isfinite(sums["loss"]):
            rows = gathered([] if math.isfinite(own) else self._row_ids)
            raise _non_finite("loss", sums["loss"], self.global_step, [row for part in rows for row in part])
        return sums

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As inherited; then read the gradient norm if only DeepSpeed knows it.

        Raises:
            NonFiniteLossError: it is not finite; the weights are spoilt, but not saved.
        """
        super().optimizer_step(*args, **kwargs)
        strategy = self.trainer.strategy
        if isinstance(strategy, ZeroStrategy) and self._ends_step:
            self.step_metrics["train/grad_norm"] = strategy.norm_of_last_step()
            self._check_norm(self.step_metrics["train/grad_norm"])

    @property
    def _ends_step(self) -> bool:
        """True if the current micro-batch is the last of its optimiser step."""
        return (self._batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    def _check_norm(self, norm: float) -> None:
        # In float16 the scaler (DeepSpeed's is in its engine) skips such steps and lowers its scale.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None or (
            isinstance(self.trainer.strategy, ZeroStrategy) and str(self.trainer.precision).startswith("16")
        )
        if not math.isfinite(norm) and not scaled:
            raise _non_finite("gradient's norm", norm, self.global_step, self._row_ids)

    def configure_optimizers(self) -> Any:
        """Make AdamW and its schedule, stepped once per optimiser step."""
        self._warn_of_rounding()
        kind = optimizer_class(self.trainer.strategy)
        optimizer, scheduler = self.optim.build(
            self.student, self.total_steps, kind, self.seed, self.step.loss_part, self.step.loss.trainable_lr
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _warn_of_rounding(self) -> None:
        # In half precision DeepSpeed adds the updates to float32 weights of its own.
        half = str(self.trainer.precision).startswith(("16", "bf16"))
        if (isinstance(self.trainer.strategy, ZeroStrategy) and half) or self.optim.half_weights != "nearest":
            return
        found = rounding_warning(self.student.parameters(), self.optim.lr)
        if found and self.trainer.is_global_zero:
            log.warning("%s.", found)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the schedules and the last step's metrics (a run without validation data reports its loss)."""
        checkpoint["state_dict"] = self._kept(self, checkpoint["state_dict"])
        checkpoint["step_metrics"] = self.step_metrics
        checkpoint["schedules"] = {name: s.state_dict() for name, s in self.step.loss.schedules.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the metrics and the schedules."""
        self.step_metrics = checkpoint["step_metrics"]
        for name, schedule in self.step.loss.schedules.items():
            schedule.load_state_dict(checkpoint["schedules"][name])

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch with its own ``to``."""
        return batch.to(device, non_blocking=True)


def _non_finite(what: str, value: float, step: int, row_ids: list[int]) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"the {what} is {value} at optimiser step {step}, rows {row_ids} of the training set; "
        "the last good checkpoint is kept. Lower optim.lr, raise optim.warmup_steps, or look at those rows"
    )


def _mix(seed: int, micro_batch: int, rank: int) -> int:
    """Return a 63-bit seed from three small numbers; SplitMix64's finaliser makes neighbours unrelated."""
    z = (seed * 0x9E3779B97F4A7C15 + micro_batch * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return (z ^ (z >> 31)) >> 1
