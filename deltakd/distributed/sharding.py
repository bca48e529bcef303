"""Sharded parameters, and values gathered from all ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from deltakd.models import LanguageModel, transformer_blocks

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """Return the value of every rank, in rank order. Collective: call on every rank.

    Args:
        value: anything that can be pickled.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


#: The process group that ``_hosts`` was made beside, and the group of the hosts.
_made: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] = (None, None)


def _hosts() -> dist.ProcessGroup | None:
    """Return a group in which the hosts talk, over gloo; None: the default group is such. Made once, collectively."""
    global _made
    if dist.get_backend() == "gloo":
        return None
    if _made[0] is not dist.group.WORLD:
        _made = (dist.group.WORLD, dist.new_group(backend="gloo"))
    return _made[1]


def on_any_rank(decision: bool) -> bool:
    """Return True if the decision is True on at least one rank. Collective: call on every rank.

    Only the hosts wait for each other: GPUs keep working on what is queued.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return decision
    found = torch.tensor([int(decision)])
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_hosts())
    return bool(found)


def place() -> tuple[int, int]:
    """Return (rank, world size) of this process; (0, 1) if it is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def shard_by_blocks(
    root: nn.Module,
    mesh: DeviceMesh,
    reshard_after_forward: bool | None = None,
    autocast: torch.dtype | None = None,
) -> None:
    """Shard a module in place with FSDP2: each transformer block separately, everything else with the root.

    Blocks are gathered as they run. The root's own parameters, such as embeddings and head, are whole while the root's
    ``forward`` runs, in their own dtype.

    Args:
        root: the module whose ``forward`` will be called.
        mesh: the ranks, in one dimension.
        reshard_after_forward: True: the root reshards its own parameters after each forward pass; None: after the
            backward pass, FSDP2's default.
        autocast: the half-precision dtype that autocast computes in, whenever the module runs: the linear layers of
            blocks are gathered in it, instead of being cast afterwards; their gradients are summed over the ranks in
            float32. None: all are gathered in their own dtype.
    """
    for block in transformer_blocks(root):
        norms = None if autocast is None else _norms_among_linears(block)
        if norms is None:
            fully_shard(block, mesh=mesh)
            continue
        # Under autocast a norm computes in float32. What is sharded first is not the block's any more.
        if norms:
            fully_shard(norms, mesh=mesh)
        # Inputs stay as they are: residuals are float32, and autocast casts those of linear layers.
        policy = MixedPrecisionPolicy(autocast, torch.float32, cast_forward_inputs=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, reshard_after_forward=reshard_after_forward)


def _norms_among_linears(block: nn.Module) -> list[nn.Module] | None:
    """Return the modules with parameters that autocast leaves in float32; None if the block has more than these.

    Others than linear layers and norms, such as experts or convolutions, may use their parameters in either dtype.
    """
    norms = []
    for module in block.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Linear | Conv1D):
            if not all(p.is_floating_point() for p in own):
                return None  # packed weights
        elif own:
            if any(p.ndim != 1 for p in own) or any(True for _ in module.children()):
                return None
            norms.append(module)
    return norms


def is_sharded(model: nn.Module) -> bool:
    """True if FSDP2 or ZeRO 3 shards the parameters."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's name and whole value, one at a time, tied ones once.

    Collective if the model is sharded: call on every rank.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            yield name, parameter.full_tensor().detach()
        elif hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach().clone()
        else:
            yield name, parameter.detach()


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters on this rank while idle: its shard of sharded ones, tied ones once."""
    return sum(_held(parameter).nbytes for parameter in model.parameters())


def _held(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    # ZeRO 3 empties a partitioned parameter and attaches this rank's part; one kept whole has both.
    part = getattr(parameter, "ds_tensor", None)
    return parameter if part is None or parameter.numel() > part.numel() else part


def gradient_norm(model: nn.Module) -> Tensor | None:
    """Return the gradient norm over all trained parameters and ranks, a scalar; None if DeepSpeed holds the gradients.

    Collective if the model is sharded. The host does not wait for it.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        return None
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@final
class Shell:
    """A copy of a model without parameters, to be filled from its sharded twin.

    Generation and export need a model that one rank can run alone, at its own pace.

    Args:
        model: the model before it is sharded; it is copied and left unchanged.
    """

    def __init__(self, model: LanguageModel) -> None:
        # The copies of plain parameters are empty from the start: a second whole model might not fit.
        hollow = {
            id(p): nn.Parameter(p.new_empty(0), requires_grad=p.requires_grad)
            for p in model.parameters()
            if type(p) is nn.Parameter
        }
        self._model = copy.deepcopy(model, hollow)
        self._parameters = dict(self._model.named_parameters())
        self.empty()

    def empty(self) -> None:
        """Free the memory of the parameters."""
        for parameter in self._parameters.values():
            parameter.data = parameter.data.new_empty(0)

    @contextmanager
    def filled(self, sharded: nn.Module) -> Iterator[LanguageModel]:
        """Lend the whole model on this rank, in eval mode; empty again afterwards.

        Collective: call on every rank.

        Args:
            sharded: the model that gives the parameters.
        """
        for name, value in whole_parameters(sharded):
            self._parameters[name].data = value
        for buffer in self._model.buffers():
            buffer.data = buffer.data.to(value.device)
        try:
            yield self._model.eval()
        finally:
            self.empty()

    def load(self, state: dict[str, Tensor]) -> LanguageModel:
        """Return the model, in eval mode, with the parameters that ``state`` names."""
        for name, parameter in self._parameters.items():
            parameter.data = state[name]
        return self._model.eval()
