"""The processes of a server: the first one talks to trainers, all of them run the models on every request."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, final

import torch
import torch.distributed as dist
from torch import Tensor

from deltakd.distributed.ranks import START_TIMEOUT
from deltakd.io.errors import LostServerError
from deltakd.models import LanguageModel
from deltakd.references.live import LiveReferences
from deltakd.references.serving.requests import batch_of, images_of
from deltakd.references.serving.wire import describe, read_description
from deltakd.types import Batch, Head

#: How several processes hold the models (``reference.sharding``).
Sharding = Literal["replicate", "shard", "tensor"]
#: What the first process tells the others.
_STOP, _WAIT, _RUN = range(3)
#: Numbers in which it does.
_SAID = 5


@final
class Team:
    """Runs the models for a server, alone or with the other processes that it was started with.

    Whole or sharded models (FSDP2) get a part of each request's rows in every process; models that are split by tensor
    parallelism run all rows together. Rows with images are not divided: how their tensors belong to the rows differs
    from family to family. Whole models run them in the first process, others in all processes together.

    Args:
        models: role -> model.
        device: of this process.
        sharding: how several processes hold the models.
        packing: lay rows end to end.
        vocabulary: V of the models.
        positions: most tokens of a row; None: no limit.
    """

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        device: torch.device,
        sharding: Sharding,
        packing: bool,
        vocabulary: int,
        positions: int | None,
    ) -> None:
        self._roles = sorted(models)
        self._device = device
        self._sharding = sharding
        self._packing = packing
        self._vocabulary = vocabulary
        self._positions = positions
        self._size = dist.get_world_size() if dist.is_initialized() else 1
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._references = LiveReferences(models, sharding="shard" if sharding == "shard" else "replicate")
        self._references.to(device)

    def checked(self, request: Mapping[str, Tensor]) -> Batch:
        """Return a request's batch. Raises ValueError if it is none, or the models can't run it."""
        return batch_of(request, self._packing, self._vocabulary, self._positions)

    def run(
        self, roles: Collection[str], request: Mapping[str, Tensor], batch: Batch
    ) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Run a request, in the first process.

        Args:
            roles: whose hidden states are wanted.
            request: from the trainer.
            batch: the request's (``checked``).

        Returns:
            Role -> name, and name -> [N, D] hidden states; roles of one model under one adapter share a name.

        Raises:
            RuntimeError: the models fail, in a server of one process.
            LostServerError: they fail in one of several, or it is gone.
        """
        images = images_of(request)
        if self._size == 1 or (images and self._sharding == "replicate"):
            return _named(self._heads(roles, batch))
        with _lost("a process of this server failed or is gone"):
            ids_BT = request["input_ids"]
            mask = sum(1 << place for place, role in enumerate(self._roles) if role in roles)
            description = json.dumps(describe(images)).encode() if images else b""
            self._tell(_RUN, *ids_BT.shape, mask, len(description))
            content = torch.stack([ids_BT, *(request[name].int() for name in ("attention_mask", "trained"))])
            dist.broadcast(content, 0)
            if images:
                dist.broadcast(torch.frombuffer(bytearray(description), dtype=torch.uint8), 0)
                for tensor in images.values():
                    _broadcast(tensor.contiguous())
            listed, own = self._run_own(roles, content, images)
            if not self._divides(images):
                return listed, own
            return listed, {name: self._gathered(hidden, batch) for name, hidden in own.items()}

    def follow(self) -> None:
        """Run what the first process asks for, until it stops, in another process.

        Raises:
            LostServerError: the first process is gone.
        """
        with _lost("this process of the server failed, or the first one is gone"):
            while (said := self._heard())[0] != _STOP:
                if said[0] != _RUN:
                    continue
                content = torch.empty(3, said[1], said[2], dtype=torch.int32)
                dist.broadcast(content, 0)
                images = self._heard_images(said[4])
                roles = [role for place, role in enumerate(self._roles) if said[3] >> place & 1]
                try:
                    _, own = self._run_own(roles, content, images)
                except _ImagesError:
                    # The first process says so to the trainer.
                    continue
                if self._divides(images):
                    for hidden in own.values():
                        dist.send(hidden.contiguous(), 0)

    def wait(self) -> None:
        """Let the others know that nothing is wrong, long before they take the first process for dead.

        Raises:
            LostServerError: one is gone.
        """
        if self._size > 1:
            with _lost("a process of this server is gone"):
                self._tell(_WAIT)

    def stop(self) -> None:
        """End the others. Raises LostServerError if one is gone already."""
        if self._size > 1:
            with _lost("a process of this server is gone"):
                self._tell(_STOP)

    def _tell(self, *said: int) -> None:
        dist.broadcast(torch.tensor([*said, *[0] * (_SAID - len(said))]), 0)

    def _heard(self) -> list[int]:
        said = torch.empty(_SAID, dtype=torch.int64)
        dist.broadcast(said, 0)
        found: list[int] = said.tolist()
        return found

    def _heard_images(self, size: int) -> dict[str, Tensor]:
        """Return the images of a request.

        Args:
            size: bytes of their description; 0: there are none.
        """
        if not size:
            return {}
        description = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(description, 0)
        described = read_description(json.loads(bytes(description.numpy())))
        found = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in described.items()}
        for tensor in found.values():
            _broadcast(tensor)
        return found

    def _divides(self, images: Mapping[str, Tensor]) -> bool:
        """True if each process runs a part of a request's rows."""
        return self._sharding != "tensor" and not images

    def _run_own(
        self, roles: Collection[str], content_3BT: Tensor, images: Mapping[str, Tensor]
    ) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Run this process's part of a request; return as ``run``.

        Raises:
            _ImagesError: the models can't read the images, so all processes fail alike.
        """
        try:
            return _named(self._own_part(roles, content_3BT, images))
        except (LostServerError, torch.OutOfMemoryError):
            raise
        # Images of the right kinds may still be none that a model can read, which it shows in many ways.
        except Exception as error:
            if not images:
                raise
            raise _ImagesError(str(error)) from None

    def _heads(self, roles: Collection[str], batch: Batch) -> dict[str, Head]:
        return self._references.heads(roles, batch, self._references.sent(batch))

    def _part_of(self, rank: int, rows: int) -> slice:
        """Return the rows of a request that a process runs if the rows are divided."""
        return slice(rows * rank // self._size, rows * (rank + 1) // self._size)

    def _own_part(self, roles: Collection[str], content_3BT: Tensor, images: Mapping[str, Tensor]) -> dict[str, Head]:
        """Return the heads of this process's rows.

        One without rows runs a position that nobody asked for: sharded layers are gathered by all processes together.
        """
        own = self._part_of(self._rank, content_3BT.shape[1]) if self._divides(images) else slice(None)
        ids, mask, trained = content_3BT[:, own]
        if not len(ids):
            ids, mask, trained = content_3BT[:, :1, :1] * torch.tensor([1, 1, 0], dtype=torch.int32).view(3, 1, 1)
        longest = int(mask.sum(1).max())
        tensors = {"input_ids": ids, "attention_mask": mask.bool(), "trained": trained.bool()}
        cut = {name: tensor[:, :longest].contiguous() for name, tensor in tensors.items()}
        return self._heads(roles, batch_of({**cut, **images}, self._packing, self._vocabulary, self._positions))

    def _gathered(self, own_ND: Tensor, batch: Batch) -> Tensor:
        """Return the hidden states of all processes' rows, in the rows' order."""
        rows = len(batch.row_ids)
        tokens = torch.bincount(batch.rows_N, minlength=rows)
        parts = [own_ND]
        for rank in range(1, self._size):
            count = int(tokens[self._part_of(rank, rows)].sum())
            part = own_ND.new_empty(count, own_ND.shape[1])
            dist.recv(part, rank)
            parts.append(part)
        return torch.cat(parts)


class _ImagesError(ValueError):
    """The models can't read a request's images."""


def _broadcast(tensor: Tensor) -> None:
    """Send the first process's tensor of any dtype to the others. Collective."""
    if tensor.numel():
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)


@contextmanager
def _lost(what: str) -> Iterator[None]:
    """Turn the failure of a model, or of the processes' group, into an error that ends the process in one line.

    One process that goes on without the others would wait for them for ever.
    """
    try:
        yield
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LostServerError(f"{what} ({first}); start the server again: trainers wait for it") from None


def _named(heads: Mapping[str, Head]) -> tuple[dict[str, str], dict[str, Tensor]]:
    names: dict[int, str] = {}
    listed = {role: names.setdefault(id(head.hidden), role) for role, head in heads.items()}
    return listed, {name: heads[name].hidden for name in names.values()}


def join_team(device: torch.device, rank: int, size: int) -> None:
    """Form the group of a server's processes, whose launcher says where they meet."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=START_TIMEOUT)
