"""How a run is spread over processes: Lightning's strategies, chosen and completed."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy

#: The file of a sharded checkpoint that holds all but weights and optimiser state (FSDP2's name for it).
META = "meta.pt"

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


def make_strategy(config: dict[str, Any]) -> str | Strategy:
    """The strategy that ``conf/strategy`` names.

    Args:
        config: ``name`` (auto, ddp, deepspeed, fsdp); for deepspeed ``stage`` and, for stage 3,
            ``persistence_threshold``.
    """
    if config["name"] == "deepspeed":
        _prepare_deepspeed()
        strategy = ZeroStrategy(
            stage=config["stage"],
            logging_level=logging.WARNING,
            exclude_frozen_parameters=True,
        )
        if config["stage"] == 3:
            assert isinstance(strategy.config, dict)
            strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = config["persistence_threshold"]
        return strategy
    if config["name"] == "fsdp":
        return ShardedDataParallel(data_parallel_size="auto", tensor_parallel_size=1)
    return str(config["name"])


def _prepare_deepspeed() -> None:
    """Before DeepSpeed is imported for the first time."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        # Compiled for a minute at every start, and only a faster way between processes of one machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@final
class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed's ZeRO, on CPUs, too: what runs on a laptop and in the tests is what runs on GPUs."""

    @property
    def root_device(self) -> torch.device:
        """The device of this rank; DeepSpeed wants a number even for a CPU."""
        if isinstance(self.accelerator, CPUAccelerator):
            return torch.device("cpu", self.local_rank)
        return super().root_device

    def setup_environment(self) -> None:
        """As inherited, but for the check that refuses CPUs."""
        if isinstance(self.accelerator, CPUAccelerator):
            super(DeepSpeedStrategy, self).setup_environment()
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        """As inherited, but for the check that wants numbered GPUs."""
        if isinstance(self.accelerator, CPUAccelerator):
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """As inherited; beside it what is not weights or optimiser state, as FSDP2's checkpoints have it."""
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.is_global_zero:
            rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
            torch.save(rest, Path(filepath) / META)

    def norm_of_last_step(self) -> float:
        """The gradient's norm in the last optimiser step, over all ranks, before clipping."""
        return float(self.deepspeed_engine.get_global_grad_norm())


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


def loss_factor(trainer: L.Trainer) -> int:
    """By what the share of a micro-batch in the loss of its whole optimiser step has to be multiplied.

    Lightning divides by the number of micro-batches, DeepSpeed does so once more, and all strategies average over
    ranks; the denominator of the share holds all of it already.
    """
    micro_batches = trainer.accumulate_grad_batches
    return micro_batches * trainer.world_size * (micro_batches if isinstance(trainer.strategy, ZeroStrategy) else 1)
