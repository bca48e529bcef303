"""How the tensors of an answer reach the trainer: by memory that both see, by a group of the two, or by the socket."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor

from deltakd.references.serving import cuda_ipc, gloo_link, nccl_link
from deltakd.references.serving.cuda_ipc import CudaIpcReceiver, CudaIpcSender, CudaRuntime, Pool
from deltakd.references.serving.endpoints import Receiver, Sender, UnavailableError
from deltakd.references.serving.gloo_link import GlooLink
from deltakd.references.serving.link import LinkReceiver, LinkSender
from deltakd.references.serving.nccl_link import NcclDriver, NcclLink, gpu_of
from deltakd.references.serving.shared_memory import SharedMemoryReceiver, SharedMemorySender

#: As the config names them (``reference.transport``).
Transport = Literal["auto", "socket", "shared_memory", "cuda_ipc", "nccl", "gloo"]
SOCKET = "socket"
_CPU = torch.device("cpu")
#: What a server lacks that does not offer a way.
_MISSING = {nccl_link.NAME: "the server's models are on no CUDA device, or it has no NCCL"}


@final
class SocketSender(Sender):
    """Tensors travel in the frame."""

    name = SOCKET

    def place(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the tensors on the CPU, once the device has computed them."""
        return {}, {name: tensor.cpu() for name, tensor in tensors.items()}

    def close(self) -> None:
        """Nothing was kept."""


@final
class Offers:
    """The ways that a server has for tensors.

    Args:
        device: of its models.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Pool | None = None
        if device.type == "cuda":
            with suppress(UnavailableError):
                self._pool = Pool(device, CudaRuntime())

    def make(self, asked: Collection[str]) -> dict[str, tuple[Sender, dict[str, Any]]]:
        """Return name -> the server's side of each way that a trainer asks for and the server has, and its offer."""
        found: dict[str, tuple[Sender, dict[str, Any]]] = {SOCKET: (SocketSender(), {})}
        if SharedMemorySender.name in asked:
            with suppress(UnavailableError, OSError):
                shared = SharedMemorySender()
                found[shared.name] = (shared, shared.offer())
        if cuda_ipc.NAME in asked and self._pool is not None:
            with suppress(RuntimeError):
                sender = CudaIpcSender(self._pool)
                found[sender.name] = (sender, sender.offer())
        if gloo_link.NAME in asked:
            found[gloo_link.NAME] = (LinkSender(gloo_link.NAME, GlooLink, _CPU), {})
        if nccl_link.NAME in asked:
            with suppress(UnavailableError):
                driver = NcclDriver(self._device)
                link = LinkSender(nccl_link.NAME, partial(NcclLink, driver=driver), self._device)
                found[link.name] = (link, {"gpu": gpu_of(self._device)})
        return found


class Chosen(NamedTuple):
    """A trainer's choice.

    Args:
        name: of the transport.
        receiver: its side of it; None: the socket.
        reason: why faster ones are not possible; empty if none was tried.
    """

    name: str
    receiver: Receiver | None
    reason: str


def candidates(wanted: Transport, device: torch.device) -> list[str]:
    """Return what to ask a server for, the fastest first.

    Args:
        wanted: by the config.
        device: where the trainer wants the tensors.
    """
    if wanted != "auto":
        return [wanted]
    # On a CPU, opening a GPU would cost its memory.
    return [*([cuda_ipc.NAME] if device.type == "cuda" else []), SharedMemoryReceiver.name, SOCKET]


def choose(names: Sequence[str], offered: Mapping[str, Any], device: torch.device = _CPU) -> Chosen:
    """Return the first transport that works.

    Args:
        names: from ``candidates``.
        offered: by the server.
        device: where the trainer wants the tensors.

    Raises:
        UnavailableError: none does.
    """
    makers: dict[str, Callable[[Any], Receiver]] = {
        cuda_ipc.NAME: CudaIpcReceiver,
        SharedMemoryReceiver.name: SharedMemoryReceiver,
        gloo_link.NAME: lambda offer: LinkReceiver(gloo_link.NAME, GlooLink),
        nccl_link.NAME: lambda offer: _by_nccl(offer, device),
    }
    reasons: list[str] = []
    for name in names:
        if name == SOCKET:
            return Chosen(name, None, "; ".join(reasons))
        try:
            if name not in offered:
                raise UnavailableError(_MISSING.get(name, "the server has none"))
            return Chosen(name, makers[name](offered[name]), "; ".join(reasons))
        except UnavailableError as error:
            reasons.append(f"{name} is not possible: {error}")
    raise UnavailableError("; ".join(reasons))


def _by_nccl(offer: Any, device: torch.device) -> LinkReceiver:
    """Return the trainer's side of a group of two GPUs. Raises UnavailableError."""
    if device.type != "cuda":
        raise UnavailableError(f"this run's device is {device}, and NCCL joins GPUs alone")
    driver = NcclDriver(device)
    if isinstance(offer, Mapping) and offer.get("gpu") == gpu_of(device):
        raise UnavailableError("server and run are on one GPU, and NCCL joins two; cuda_ipc is made for that")
    return LinkReceiver(nccl_link.NAME, partial(NcclLink, driver=driver))
