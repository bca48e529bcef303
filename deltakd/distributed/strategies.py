"""Lightning's strategy for a config, and everything that depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from deltakd.distributed.launchers import count_devices
from deltakd.distributed.ranks import external_launch
from deltakd.distributed.settings import StrategySettings
from deltakd.distributed.zero import ZeroStrategy, make_zero


def count_ranks(accelerator: str, devices: Any, num_nodes: int) -> int:
    """Return the number of processes of a training run over all machines, as Lightning will count them.

    It is needed before there is a trainer: callbacks need the number of optimiser steps, which depends on it.

    Args:
        accelerator: ``trainer.accelerator``.
        devices: ``trainer.devices``.
        num_nodes: ``trainer.num_nodes``.
    """
    launch = external_launch()
    if launch is not None:
        return launch.world_size
    per_machine = count_devices(devices)
    if per_machine is None:
        has_gpus = accelerator in ("auto", "gpu", "cuda") and CUDAAccelerator.is_available()
        per_machine = CUDAAccelerator.auto_device_count() if has_gpus else 1
    # Lightning itself rejects 0 devices, with its own message.
    return max(1, per_machine) * num_nodes


def check_ranks(trainer: L.Trainer, expected: int) -> None:
    """Check a trainer's number of processes against ``count_ranks``.

    Raises:
        ValueError: they differ.
    """
    if trainer.world_size != expected:
        raise ValueError(
            f"Lightning makes {trainer.world_size} processes of this run, but trainer.devices and trainer.num_nodes "
            f"were taken for {expected}; give trainer.devices as a number"
        )


def make_strategy(settings: StrategySettings) -> str | Strategy:
    """Return Lightning's strategy, as an object or by name."""
    if settings.name == "deepspeed":
        assert settings.stage is not None, "ZeRO without a stage"
        return make_zero(settings.stage, settings.persistence_threshold, settings.offload)
    if settings.name == "fsdp":
        return ShardedDataParallel(data_parallel_size="auto", tensor_parallel_size=1)
    return settings.name


def make_plugins(settings: StrategySettings) -> list[Any]:
    """Return Lightning's plugins for a strategy: how files are written, how SLURM is read."""
    files = [WholeFiles()] if settings.name in ("auto", "ddp") else []
    slurm = cluster_plugin()
    return files if slurm is None else [*files, slurm]


def cluster_plugin() -> SLURMEnvironment | None:
    """Return Lightning's plugin for processes started by SLURM; None if Lightning's own choice is right.

    On SIGUSR1, Lightning's default would save a checkpoint in its own format and requeue the job.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return None
    return SLURMEnvironment(auto_requeue=False)


@final
class WholeFiles(TorchCheckpointIO):
    """Single-file checkpoints, written directly to their place.

    Lightning's own go through the system's temporary directory, and are left there if the disk is full.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write through a Python file, whose errors give the reason for a disk failure."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(checkpoint, file)


@final
class ShardedDataParallel(ModelParallelStrategy):
    """FSDP2 over all ranks; the module shards itself in ``configure_model``."""

    def setup_environment(self) -> None:
        """Make all ranks data-parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def optimizer_class(strategy: Strategy) -> type[torch.optim.Optimizer]:
    """Return the AdamW class for the student: DeepSpeed's if its state is in CPU memory, else PyTorch's."""
    if isinstance(strategy, ZeroStrategy) and strategy.offloads_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam
    return torch.optim.AdamW


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return autocast's dtype under a ``trainer.precision`` that FSDP2 takes; None: there is no autocast."""
    return torch.bfloat16 if precision == "bf16-mixed" else None


def loss_factor(trainer: L.Trainer) -> int:
    """Return the factor that undoes what Lightning and the strategy divide a micro-batch's loss by.

    Lightning divides by the number of micro-batches, DeepSpeed does so again, and all strategies average over ranks;
    the denominator of the loss already covers the whole optimiser step.
    """
    micro_batches = trainer.accumulate_grad_batches
    return micro_batches * trainer.world_size * (micro_batches if isinstance(trainer.strategy, ZeroStrategy) else 1)
