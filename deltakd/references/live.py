"""References that run beside the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import final

import torch

from deltakd.models import LanguageModel
from deltakd.types import STUDENT_RAW, Batch, Head


@final
class LiveReferences:
    """Frozen models, run on every batch; hidden states travel to the student's device, never logits.

    Args:
        models: role -> model; frozen here, in eval mode for good.
        adapted_student: a LoRA student whose raw self is the adapter switched off; it then serves ``student_raw``.
        placement: ``auto`` follows the student's device; else the name of a device where the references stay.
    """

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        adapted_student: LanguageModel | None = None,
        placement: str = "auto",
    ) -> None:
        self._models = dict(models)
        self._adapted_student = adapted_student
        self._placement = placement
        self._device = torch.device("cpu")
        #: Heads of models that stay elsewhere, sent to the student's device once.
        self._remote_weights: dict[str, torch.Tensor] = {}
        for model in self._models.values():
            model.eval().requires_grad_(False)

    @property
    def roles(self) -> frozenset[str]:
        """The roles that it can give."""
        extra = {STUDENT_RAW} if self._adapted_student is not None else set()
        return frozenset(self._models) | extra

    def to(self, device: torch.device) -> None:
        """Follow the student to ``device``, or stay where ``placement`` says and send hidden states there."""
        self._device = device
        home = self._home
        for model in self._models.values():
            # Most kinds of quantised weights can't be moved, or only from the RAM to where they are packed.
            if not (model.quantized and next(model.parameters()).device.type == home.type):
                model.to(home)

    @property
    def _home(self) -> torch.device:
        return self._device if self._placement == "auto" else torch.device(self._placement)

    def start(self, batch: Batch) -> Callable[[], dict[str, Head]]:
        """Run now what shares the student's device: its activations are gone before those of the student exist.

        What runs elsewhere is sent its batch now and runs after the student's forward pass has been queued: both
        devices then work at the same time, and nothing waits but the loss.
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
        there = {role: self._run(model, batch_there) for role, model in self._models.items()}
        # After all of them have been queued: a copy to the student's device waits for what it copies.
        heads = {role: self._brought(role, head) for role, head in there.items()}
        if self._adapted_student is not None:
            with self._adapted_student.adapter_off():
                head = self._adapted_student(batch)
            heads[STUDENT_RAW] = replace(head, weight=head.weight.detach())
        return heads

    def _run(self, model: LanguageModel, batch: Batch) -> Head:
        # The student's autocast must not reach the references: each runs in its own dtype.
        with torch.autocast(self._home.type, enabled=False):
            return model(batch)

    def _brought(self, role: str, head: Head) -> Head:
        if head.hidden.device == self._device:
            return head
        if role not in self._remote_weights or self._remote_weights[role].device != self._device:
            self._remote_weights[role] = head.weight.to(self._device)
        bias = None if head.bias is None else head.bias.to(self._device)
        return replace(head, hidden=head.hidden.to(self._device), weight=self._remote_weights[role], bias=bias)
