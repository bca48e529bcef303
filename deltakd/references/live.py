"""References that run beside the student."""

from __future__ import annotations

from collections.abc import Mapping
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
        home = device if self._placement == "auto" else torch.device(self._placement)
        for model in self._models.values():
            # Most kinds of quantised weights can't be moved, or only from the RAM to where they are packed.
            if not (model.quantized and next(model.parameters()).device.type == home.type):
                model.to(home)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Head]:
        """Role -> head of the batch's N valid tokens."""
        heads = {role: self._run(role, model, batch) for role, model in self._models.items()}
        if self._adapted_student is not None:
            with self._adapted_student.adapter_off():
                head = self._adapted_student(batch)
            heads[STUDENT_RAW] = replace(head, weight=head.weight.detach())
        return heads

    def _run(self, role: str, model: LanguageModel, batch: Batch) -> Head:
        home = next(model.parameters()).device
        # The student's autocast must not reach the references: each runs in its own dtype.
        with torch.autocast(home.type, enabled=False):
            head = model(batch.to(home))
        if home == self._device:
            return head
        if role not in self._remote_weights or self._remote_weights[role].device != self._device:
            self._remote_weights[role] = head.weight.to(self._device)
        bias = None if head.bias is None else head.bias.to(self._device)
        return replace(head, hidden=head.hidden.to(self._device), weight=self._remote_weights[role], bias=bias)
