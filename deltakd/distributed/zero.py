"""DeepSpeed's ZeRO through Lightning, on GPUs and on CPUs."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, final

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy

from deltakd.distributed.settings import PERSISTENCE_THRESHOLD
from deltakd.distributed.zero_checkpoints import for_any_ranks, ranks_of

#: File of a sharded checkpoint with everything except weights and optimiser state (FSDP2's name for it).
META = "meta.pt"


def prepare_deepspeed() -> None:
    """Set up the environment; call before DeepSpeed is first imported."""
    # Operations compiled at first use look for ninja, which pip installs next to the interpreter.
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        # It compiles for a minute at every start, and only speeds up communication within a machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_zero(stage: int, persistence_threshold: int = PERSISTENCE_THRESHOLD, offload: bool = False) -> ZeroStrategy:
    """Make a ZeRO strategy.

    Args:
        stage: 1, 2 or 3.
        persistence_threshold: stage 3 keeps parameters with fewer elements whole on every rank.
        offload: keep parameters and optimiser state in CPU memory (stage 3).
    """
    prepare_deepspeed()
    strategy = ZeroStrategy(
        stage=stage,
        logging_level=logging.WARNING,
        exclude_frozen_parameters=True,
        offload_optimizer=offload,
        offload_parameters=offload,
        pin_memory=offload and torch.cuda.is_available(),
    )
    if stage == 3:
        assert isinstance(strategy.config, dict)
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = persistence_threshold
    return strategy


@final
class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed's ZeRO, also on CPUs, so that laptops and tests run the same code as GPUs.

    Its checkpoints can be resumed on any number of ranks.
    """

    @property
    def root_device(self) -> torch.device:
        """The device of this rank; DeepSpeed wants an index even for a CPU."""
        if isinstance(self.accelerator, CPUAccelerator):
            return torch.device("cpu", self.local_rank)
        return super().root_device

    @property
    def offloads_optimizer(self) -> bool:
        """True if the optimiser state is in CPU memory; DeepSpeed's own AdamW must then step it."""
        assert isinstance(self.config, dict)
        return "offload_optimizer" in self.config["zero_optimization"]

    def setup_environment(self) -> None:
        """As inherited, without the check that rejects CPUs."""
        if isinstance(self.accelerator, CPUAccelerator):
            super(DeepSpeedStrategy, self).setup_environment()
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        """As inherited, without the check that requires numbered GPUs."""
        if isinstance(self.accelerator, CPUAccelerator):
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """As inherited; also write ``META``, as FSDP2's checkpoints do."""
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.is_global_zero:
            rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
            torch.save(rest, Path(filepath) / META)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As inherited; convert a checkpoint of another number of ranks first, to DeepSpeed's universal format."""
        if ranks_of(Path(checkpoint_path)) == self.world_size:
            return super().load_checkpoint(checkpoint_path, weights_only)
        engine = self.deepspeed_engine
        options = [
            {k: v for k, v in group.items() if k not in ("params", "lr")} for group in engine.optimizer.param_groups
        ]
        engine._config.load_universal_checkpoint = True
        with for_any_ranks(Path(checkpoint_path), self) as universal:
            state = super().load_checkpoint(universal, weights_only)
        engine._config.load_universal_checkpoint = False
        # Stage 3 gives every group the first group's options (biases would decay from here on, and the trained part of
        # a loss would take the student's learning rate) and lets them share one step counter (each step would count
        # twice).
        groups = engine.optimizer.param_groups
        lr = groups[0]["lr"]
        for group, option in zip(groups, options, strict=True):
            group.update(option)
            group["lr"] = lr * (group.get("initial_lr", 1.0) / groups[0].get("initial_lr", 1.0))
        for moments in engine.optimizer.optimizer.state.values():
            if torch.is_tensor(moments.get("step")):
                moments["step"] = moments["step"].clone()
        return state

    def norm_of_last_step(self) -> float:
        """Return the gradient norm of the last optimiser step, over all ranks, before clipping."""
        return float(self.deepspeed_engine.get_global_grad_norm())
