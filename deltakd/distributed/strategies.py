"""The strategy that a config names, and what depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from deltakd.distributed.settings import StrategySettings
from deltakd.distributed.zero import ZeroStrategy, make_zero


def make_strategy(settings: StrategySettings) -> str | Strategy:
    """Make Lightning's strategy, or name one that Lightning makes."""
    if settings.name == "deepspeed":
        assert settings.stage is not None, "ZeRO without a stage"
        return make_zero(settings.stage, settings.persistence_threshold, settings.offload)
    if settings.name == "fsdp":
        return ShardedDataParallel(data_parallel_size="auto", tensor_parallel_size=1)
    return settings.name


def make_plugins(settings: StrategySettings) -> list[Any]:
    """Make what Lightning's strategies are given beside their options: how files are written, how SLURM is read."""
    files = [WholeFiles()] if settings.name in ("auto", "ddp") else []
    slurm = cluster_plugin()
    return files if slurm is None else [*files, slurm]


def cluster_plugin() -> SLURMEnvironment | None:
    """Lightning's plugin for processes that SLURM started; None where it chooses well by itself.

    On SIGUSR1 its own choice would save a checkpoint that is none of ours, and put the job back into the queue.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return None
    return SLURMEnvironment(auto_requeue=False)


@final
class WholeFiles(TorchCheckpointIO):
    """Checkpoints of one file, written where they belong.

    Lightning's own go through the system's temporary directory, and stay there where the disk is full.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write it; through Python's own file, which says why the disk does not take it."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(checkpoint, file)


@final
class ShardedDataParallel(ModelParallelStrategy):
    """FSDP2 over all ranks; the module shards itself in ``configure_model``."""

    def setup_environment(self) -> None:
        """All ranks are data-parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def optimizer_class(strategy: Strategy) -> type[torch.optim.Optimizer]:
    """The AdamW that steps the student: DeepSpeed's where its state is in the RAM, else PyTorch's."""
    if isinstance(strategy, ZeroStrategy) and strategy.offloads_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam
    return torch.optim.AdamW


def loss_factor(trainer: L.Trainer) -> int:
    """By what the share of a micro-batch in the loss of its whole optimiser step has to be multiplied.

    Lightning divides by the number of micro-batches, DeepSpeed does so once more, and all strategies average over
    ranks; the denominator of the share holds all of it already.
    """
    micro_batches = trainer.accumulate_grad_batches
    return micro_batches * trainer.world_size * (micro_batches if isinstance(trainer.strategy, ZeroStrategy) else 1)
