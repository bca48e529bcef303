"""A frozen model sharded over the ranks by FSDP2 or by DeepSpeed's ZeRO 3.

Its parameters are gathered layer by layer as it runs, then freed. All ranks must run it together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from deltakd.distributed.sharding import shard_by_blocks
from deltakd.models import LanguageModel
from deltakd.types import Head, TokenStream, dtype_of

#: The library that shards the references.
Engine = Literal["fsdp", "deepspeed"]


@final
class _WholeHead(nn.Module):
    """Runs a model and copies its output embedding, which is whole only inside ``forward``.

    It returns tensors, not a ``Head``: DeepSpeed warns about modules whose outputs contain no tensors it can find.

    Args:
        model: the frozen model.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: TokenStream) -> tuple[Tensor, Tensor, Tensor | None]:
        head = self.model.head(rows)
        return head.hidden, head.weight.clone(), None if head.bias is None else head.bias.clone()


def sharded(
    model: LanguageModel, engine: Engine, device: torch.device, persistence_threshold: int
) -> Callable[[TokenStream], Head]:
    """Shard a frozen model over all ranks. Collective: call on every rank.

    The parameters shrink to this rank's shard one block at a time, so that the device never holds all of them. Until
    then a model loaded in its file's dtype is just the memory-mapped file, shared by the ranks of a machine.

    Args:
        model: whole, on the CPU or on ``device``; sharded in place.
        engine: the library that shards it.
        device: of this rank.
        persistence_threshold: ZeRO 3 keeps parameters with fewer elements whole.

    Returns:
        A function from rows to their head, whose output embedding stays whole as long as the head is referenced.
    """
    transform = model.head_of(next(model.parameters()).new_zeros(0))
    whole = _WholeHead(model)
    run = _by_fsdp(whole, device) if engine == "fsdp" else _by_zero(whole, device, persistence_threshold)

    def head_of(rows: TokenStream) -> Head:
        hidden, weight, bias = run(rows)
        return Head(hidden, weight, bias, transform.softcap, transform.scale)

    return head_of


def _by_fsdp(whole: _WholeHead, device: torch.device) -> Any:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Otherwise the root's own parameters would stay gathered until a backward pass that never comes.
    shard_by_blocks(whole, mesh, reshard_after_forward=True)
    return whole


def _by_zero(whole: _WholeHead, device: torch.device, persistence_threshold: int) -> Any:
    import deepspeed

    dtype = dtype_of(whole)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": persistence_threshold},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    # First: initialize() moves a model that is not partitioned yet to the device as a whole.
    deepspeed.zero.Init(module=whole, config_dict_or_path=config, dtype=dtype)
    for buffer in whole.buffers():
        buffer.data = buffer.data.to(device)
    engine, *_ = deepspeed.initialize(model=whole, config=config, model_parameters=[], dist_init_required=False)
    engine.eval()
    return engine
