"""Parameters that no rank holds whole, and values that each rank holds a part of."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deltakd.models import LanguageModel

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """The value of every rank, in their order; a joint act of all ranks.

    Args:
        value: anything that can be pickled.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def place() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) where it is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a part of each parameter: FSDP2, or ZeRO 3."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter (tied ones once), one at a time; a joint act of all ranks if it is sharded."""
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
    """Bytes of parameters on this rank between two uses of a model, tied ones once; its part of sharded ones."""
    return sum(_held(parameter).nbytes for parameter in model.parameters())


def _held(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    # A partitioned parameter of ZeRO 3 is empty, and its part hangs on it; one kept whole has both.
    part = getattr(parameter, "ds_tensor", None)
    return parameter if part is None or parameter.numel() > part.numel() else part


def gradient_norm(model: nn.Module) -> float | None:
    """The norm of the gradient of all trained parameters, over all ranks; None where DeepSpeed holds the gradients."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        return None
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


@final
class Shell:
    """A model's structure and buffers without its parameters, to be filled with those of its sharded twin.

    Generation and export need a model that one rank can run by itself, at its own pace.

    Args:
        model: the model before it is sharded; it is copied, and stays as it is.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = copy.deepcopy(model)
        self._parameters = dict(self._model.named_parameters())
        self.empty()

    def empty(self) -> None:
        """Give the memory of the parameters back."""
        for parameter in self._parameters.values():
            parameter.data = parameter.data.new_empty(0)

    @contextmanager
    def filled(self, sharded: nn.Module) -> Iterator[LanguageModel]:
        """The whole model on this rank, in eval mode; a joint act of all ranks, empty again afterwards."""
        for name, value in whole_parameters(sharded):
            self._parameters[name].data = value
        for buffer in self._model.buffers():
            buffer.data = buffer.data.to(value.device)
        try:
            yield self._model.eval()
        finally:
            self.empty()

    def load(self, state: dict[str, Tensor]) -> LanguageModel:
        """The model with the parameters that ``state`` names."""
        for name, parameter in self._parameters.items():
            parameter.data = state[name]
        return self._model.eval()
