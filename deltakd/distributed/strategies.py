"""The strategy that a config names, and what depends on it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from deltakd.distributed.zero import ZeroStrategy, make_zero
from deltakd.references import PERSISTENCE_THRESHOLD

NAMES = ("auto", "ddp", "deepspeed", "fsdp")


def strategy_problems(config: dict[str, Any]) -> list[str]:
    """What is wrong with ``strategy``, one sentence each."""
    found = []
    if config["name"] not in NAMES:
        found.append(f"strategy.name is {config['name']!r}; allowed: {', '.join(NAMES)}")
    if config["name"] == "deepspeed":
        if config["stage"] not in (1, 2, 3):
            found.append(f"strategy.stage is {config['stage']!r}; ZeRO has the stages 1, 2 and 3")
        if importlib.util.find_spec("deepspeed") is None:
            found.append(
                "strategy=deepspeed_* needs DeepSpeed, which is not installed: pip install 'deltakd[deepspeed]'"
            )
    return found


def shards_parameters(config: dict[str, Any]) -> bool:
    """Whether no rank will hold the student whole."""
    return config["name"] == "fsdp" or (config["name"] == "deepspeed" and config["stage"] == 3)


def reference_engine(config: dict[str, Any]) -> dict[str, Any]:
    """What shards the references where that is asked for: what shards the student, or FSDP2 where nothing does.

    Returns:
        ``engine`` and ``persistence_threshold`` of ``LiveReferences``.
    """
    engine = "deepspeed" if config["name"] == "deepspeed" else "fsdp"
    return {"engine": engine, "persistence_threshold": config.get("persistence_threshold", PERSISTENCE_THRESHOLD)}


def make_strategy(config: dict[str, Any]) -> str | Strategy:
    """The strategy that ``conf/strategy`` names.

    Args:
        config: ``name`` (auto, ddp, deepspeed, fsdp); for deepspeed what ``make_zero`` takes.
    """
    if config["name"] == "deepspeed":
        return make_zero(**{key: value for key, value in config.items() if key != "name"})
    if config["name"] == "fsdp":
        return ShardedDataParallel(data_parallel_size="auto", tensor_parallel_size=1)
    return str(config["name"])


def make_plugins(config: dict[str, Any]) -> list[Any]:
    """What Lightning's strategies are given beside their options: how files are written, and how SLURM is read."""
    files = [WholeFiles()] if config["name"] in ("auto", "ddp") else []
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
