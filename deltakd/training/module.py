"""The LightningModule: one training step for every loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import lightning as L
import torch
from torch import Tensor, nn

from deltakd.data.batches.ahead import begun_ahead
from deltakd.data.batches.data_module import DistillationData
from deltakd.distributed.sharding import (
    Shell,
    gradient_norm,
    is_sharded,
    shard_by_blocks,
    whole_parameters,
)
from deltakd.distributed.strategies import autocast_dtype, loss_factor, optimizer_class
from deltakd.distributed.zero import ZeroStrategy
from deltakd.kernels import KernelOptions
from deltakd.models import LanguageModel
from deltakd.references import CachedReferences, References, ServedReferences
from deltakd.training.half_precision import rounding_warning
from deltakd.training.optim import AdamW
from deltakd.training.readings import StepReading, StepSums
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
        kernels: memory and precision of the loss; None: as the device allows.
        will_be_sharded: True if no rank will hold the whole student.
        token_map: of the student's vocabulary and the teachers'; None: they share one.
        router_aux_loss_coef: weight of the loss that balances the student's experts; 0: not trained.
    """

    def __init__(
        self,
        student: LanguageModel,
        references: References | None,
        loss: Loss,
        optim: AdamW,
        total_steps: int,
        seed: int,
        kernels: KernelOptions | None = None,
        will_be_sharded: bool = False,
        token_map: TokenMap | None = None,
        router_aux_loss_coef: float = 0.0,
    ) -> None:
        super().__init__()
        # from_pretrained returns models in eval mode, and Lightning keeps the mode.
        self.step = DistillationStep(student.train(), references, loss, kernels, token_map, router_aux_loss_coef)
        self.optim = optim
        self.total_steps = total_steps
        self.seed = seed
        # DeepSpeed's checkpoints hold only trained weights; frozen ones come from their source.
        self.strict_loading = all(p.requires_grad for p in student.parameters())
        self.shell = Shell(student) if will_be_sharded else None
        self._metrics: dict[str, float] = {}
        #: The last whole optimiser step, until it has been read and until it has been checked.
        self._unread: StepReading | None = None
        self._unchecked: StepReading | None = None
        #: What to add to that step's metrics once it is read.
        self._additions: list[Callable[[Mapping[str, float]], Mapping[str, float]]] = []
        #: The current optimiser step on this rank.
        self._sums = StepSums()
        self._batch_idx = 0

    @property
    def student(self) -> LanguageModel:
        """The model being trained; this rank's shard if it is sharded."""
        return self.step.student

    def configure_model(self) -> None:
        """Shard the step if the strategy is FSDP2."""
        if self.device_mesh is not None and not is_sharded(self.step):
            autocast = autocast_dtype(str(self.trainer.precision))
            shard_by_blocks(self.step, self.device_mesh["data_parallel"], autocast=autocast)

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
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, DistillationData):
            data.prepare_batch = self._prepare_batch
            if isinstance(self.step.references, ServedReferences):
                data.batches_ahead = max(data.batches_ahead, self.step.references.ahead)

    def _prepare_batch(self, batch: Batch) -> Batch:
        """Read a cache, or ask a server, for a batch of a later step, and lock its memory for a GPU.

        Runs in the loader's thread, if it has one.
        """
        if isinstance(self.step.references, CachedReferences | ServedReferences):
            batch = self.step.references.read_ahead(batch)
        return batch.pinned() if self.device.type == "cuda" else batch

    def asked_ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches on the CPU; a server of references is asked for the next ones before each."""
        references = self.step.references
        if isinstance(references, ServedReferences):
            return begun_ahead(map(references.read_ahead, batches), references.ahead)
        return iter(batches)

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

        Nothing in an optimiser step waits for a GPU: whether the loss is finite is read a step later.
        """
        assert batch.step == self.global_step, f"batch of step {batch.step} arrived at step {self.global_step}"
        # Dropout depends only on seed, micro-batch and rank, so that a resumed run draws the same.
        torch.manual_seed(_mix(self.seed, batch_idx, self.global_rank))
        total, parts = self.step(batch)
        share = total / batch.step_tokens
        shares = {name: value / batch.step_tokens for name, value in parts.items()}
        self._batch_idx = batch_idx
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._sums = StepSums()
        self._sums.add({"loss": share.detach()} | shares, batch.row_ids)
        return share * loss_factor(self.trainer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Queue this optimiser step's metrics, with the gradient norm before clipping; check those of the step before.

        Raises:
            NonFiniteLossError: the loss or the gradient of the step before is not finite; no checkpoint holds it.
        """
        if not self._ends_step:
            return  # Lightning calls DeepSpeed's step after every micro-batch; DeepSpeed knows which ones count
        norm = gradient_norm(self.step)
        reading = StepReading(self.global_step, self._sums, norm, self._summed_over_ranks)
        # Only now: while the host waits for the step before, the device has this one to compute.
        self.settle()
        self._unread = self._unchecked = reading
        reading.known["lr"] = optimizer.param_groups[0]["lr"]
        # Here, not after the optimiser's step: checkpoints written there must hold the moved schedules.
        progress = Progress(self.global_step + 1, self.total_steps)
        for name, schedule in self.step.loss.schedules.items():
            reading.known[name] = schedule.value
            schedule.on_step(progress, reading.loss)

    def _summed_over_ranks(self, values: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return values
        summed = self.trainer.strategy.reduce(values, reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed

    @property
    def latest_metrics(self) -> dict[str, float]:
        """``train/...`` of the last optimiser step that was read, mostly the one before the last; never waits."""
        return self._metrics

    @property
    def step_metrics(self) -> dict[str, float]:
        """``train/...`` of the last whole optimiser step, over all ranks; waits until the device has computed them."""
        if self._unread is not None:
            self._metrics = {f"train/{name}": value for name, value in self._unread.metrics().items()}
            self._unread = None
        while self._additions:
            self._metrics |= self._additions.pop(0)(self._metrics)
        return self._metrics

    def add_metrics(self, addition: Callable[[Mapping[str, float]], Mapping[str, float]]) -> None:
        """Add metrics to those of the last whole optimiser step; never waits.

        Args:
            addition: returns them, given those that are there; called when these are read.
        """
        self._additions.append(addition)

    def settle(self) -> None:
        """Read the last whole optimiser step's metrics and check them: before they, or its weights, go into a file.

        Collective if they are not finite: call on every rank.

        Raises:
            NonFiniteLossError: the loss or the gradient was not finite; the weights are spoilt, but not saved.
        """
        _ = self.step_metrics
        reading, self._unchecked = self._unchecked, None
        if reading is not None:
            reading.check(self._skips_bad_gradients)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As inherited; then read the gradient norm if only DeepSpeed knows it.

        Raises:
            NonFiniteLossError: it is not finite; the weights are spoilt, but not saved.
        """
        super().optimizer_step(*args, **kwargs)
        strategy = self.trainer.strategy
        if isinstance(strategy, ZeroStrategy) and self._ends_step:
            assert self._unread is not None
            self._unread.add_norm(strategy.norm_of_last_step())
            self.settle()

    @property
    def _ends_step(self) -> bool:
        """True if the current micro-batch is the last of its optimiser step."""
        return (self._batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    @property
    def _skips_bad_gradients(self) -> bool:
        # In float16 the scaler (DeepSpeed's is in its engine) skips such steps and lowers its scale.
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None or (
            isinstance(self.trainer.strategy, ZeroStrategy) and str(self.trainer.precision).startswith("16")
        )

    def on_train_end(self) -> None:
        """Check the last step."""
        self.settle()

    def configure_optimizers(self) -> Any:
        """Make AdamW and its schedule, stepped once per optimiser step."""
        self._warn_of_rounding()
        kind = optimizer_class(self.trainer.strategy)
        optimizer, scheduler = self.optim.build(
            self.student,
            self.total_steps,
            kind,
            self.seed,
            self.step.loss_part,
            self.step.loss.trainable_lr,
            fused=kind is torch.optim.AdamW and self._may_fuse,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def _may_fuse(self) -> bool:
        """True where PyTorch would loop over the weights: on a CPU, where a pass takes an eighth of the time.

        Under mixed precision Lightning refuses to clip for fused optimisers, which may unscale gradients themselves.
        """
        whole = self.device_mesh is None and not isinstance(self.trainer.strategy, ZeroStrategy)
        return whole and self.device.type == "cpu" and str(self.trainer.precision) in ("32-true", "64-true")

    def _warn_of_rounding(self) -> None:
        # In half precision DeepSpeed adds the updates to float32 weights of its own.
        half = str(self.trainer.precision).startswith(("16", "bf16"))
        if (isinstance(self.trainer.strategy, ZeroStrategy) and half) or self.optim.half_weights != "nearest":
            return
        found = rounding_warning(self.student.parameters(), self.optim.lr)
        if found and self.trainer.is_global_zero:
            log.warning("%s.", found)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the schedules and the last step's metrics (a run without validation data reports its loss).

        Raises:
            NonFiniteLossError: the weights are spoilt.
        """
        self.settle()
        checkpoint["state_dict"] = self._kept(self, checkpoint["state_dict"])
        checkpoint["step_metrics"] = self.step_metrics
        checkpoint["schedules"] = {name: s.state_dict() for name, s in self.step.loss.schedules.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the metrics and the schedules."""
        self._metrics = checkpoint["step_metrics"]
        for name, schedule in self.step.loss.schedules.items():
            schedule.load_state_dict(checkpoint["schedules"][name])

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch with its own ``to``."""
        return batch.to(device, non_blocking=True)


def _mix(seed: int, micro_batch: int, rank: int) -> int:
    """Return a 63-bit seed from three small numbers; SplitMix64's finaliser makes neighbours unrelated."""
    z = (seed * 0x9E3779B97F4A7C15 + micro_batch * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return (z ^ (z >> 31)) >> 1
