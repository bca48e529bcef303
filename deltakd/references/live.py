"""References that run beside the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import final

import torch
import torch.distributed as dist

from deltakd.distributed.settings import PERSISTENCE_THRESHOLD
from deltakd.models import LanguageModel
from deltakd.references.sharded import Engine, sharded
from deltakd.types import STUDENT_RAW, Batch, Head


@final
class LiveReferences:
    """Frozen models, run on every batch; hidden states travel to the student's device, never logits.

    Args:
        models: role -> model; frozen here, in eval mode for good.
        adapted_student: a LoRA student that serves ``student_raw`` with its adapter switched off. If it is sharded,
            its head is whole in the ``forward`` of the module that was sharded: call the references from there.
        placement: ``auto`` follows the student's device; else the name of a device where the references stay.
        sharding: ``replicate``: each rank holds all of them; ``shard``: a part, and layers are gathered as they run.
        engine: what shards them.
        persistence_threshold: ZeRO 3 keeps parameters of fewer numbers whole on each rank.
    """

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        adapted_student: LanguageModel | None = None,
        placement: str = "auto",
        sharding: str = "replicate",
        engine: Engine = "fsdp",
        persistence_threshold: int = PERSISTENCE_THRESHOLD,
    ) -> None:
        self._models = dict(models)
        self._sharding = sharding
        self._engine = engine
        self._persistence_threshold = persistence_threshold
        #: What is run: the models, or functions that gather their parts.
        self._runners: dict[str, Callable[[Batch], Head]] = dict(models)
        self._adapted_student = adapted_student
        self._placement = placement
        self._device = torch.device("cpu")
        #: Heads of models that stay elsewhere, sent to the student's device once.
        self._remote_weights: dict[str, torch.Tensor] = {}
        for model in self._models.values():
            model.eval().requires_grad_(False)

    @property
    def roles(self) -> frozenset[str]:
        """The roles it can give."""
        extra = {STUDENT_RAW} if self._adapted_student is not None else set()
        return frozenset(self._models) | extra

    def to(self, device: torch.device) -> None:
        """Follow the student to ``device``, or stay where ``placement`` says and send hidden states there.

        Sharded references are divided here. Collective then: call on every rank.
        """
        self._device = device
        home = self._home
        if self._sharding == "shard" and dist.is_initialized():
            self._runners = {
                role: sharded(model, self._engine, device, self._persistence_threshold)
                for role, model in self._models.items()
            }
            return
        for model in self._models.values():
            # Most kinds of quantised weights can't be moved, or only from CPU memory to where they are packed.
            if not (model.quantized and next(model.parameters()).device.type == home.type):
                model.to(home)

    @property
    def _home(self) -> torch.device:
        return self._device if self._placement == "auto" else torch.device(self._placement)

    def start(self, batch: Batch) -> Callable[[], dict[str, Head]]:
        """Run now what shares the student's device: its activations are freed before the student's exist.

        What runs elsewhere is sent its batch now and runs after the student's forward pass has been queued: both
        devices then work at the same time, and only the loss waits.
        """
        if self._home == self._device:
            heads = self(batch)
            return lambda: heads
        batch_there = batch.to(self._home, non_blocking=self._home.type == "cuda")
        return lambda: self._heads(batch, batch_there)

    def __call__(self, batch: Batch) -> dict[str, Head]:
        """Role -> head of the batch's N valid tokens."""
        return self._heads(batch, batch.to(self._home))

    @torch.no_grad()
    def _heads(self, batch: Batch, batch_there: Batch) -> dict[str, Head]:
        there = {role: self._run(runner, batch_there) for role, runner in self._runners.items()}
        # After all of them have been queued: a copy to the student's device waits for what it copies.
        heads = {role: self._brought(role, head) for role, head in there.items()}
        if self._adapted_student is not None:
            # Not called as a module: ZeRO 3 would free the head on return, and it is still to be multiplied by.
            with self._adapted_student.adapter_off():
                head = self._adapted_student.head(batch)
            heads[STUDENT_RAW] = replace(head, weight=head.weight.detach())
        return heads

    def _run(self, runner: Callable[[Batch], Head], batch: Batch) -> Head:
        # The student's autocast must not reach the references: each runs in its own dtype.
        with torch.autocast(self._home.type, enabled=False):
            return runner(batch)

    def _brought(self, role: str, head: Head) -> Head:
        if head.hidden.device == self._device:
            return head
        if role not in self._remote_weights or self._remote_weights[role].device != self._device:
            self._remote_weights[role] = head.weight.to(self._device)
        bias = None if head.bias is None else head.bias.to(self._device)
        return replace(head, hidden=head.hidden.to(self._device), weight=self._remote_weights[role], bias=bias)
