"""One step: the heads of student and references, and the summed loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from deltakd.kernels import Buckets, ChunkBuffers, KernelOptions, aligned_loss, chunked_loss
from deltakd.models import LanguageModel
from deltakd.references import References, RoutedHeads
from deltakd.types import STUDENT, AlignedTokens, Batch, Head, Loss, TokenFacts, TokenMap


@final
class DistillationStep(nn.Module):
    """Student, references and loss: the one module that a strategy shards, in training and in validation.

    The loss multiplies the head chunk by chunk, outside the layer that owns it. A sharding strategy must keep the head
    whole until then, and again for its gradient. Two properties ensure that:

    * Everything from the references' first layer to the loss runs in this module's ``forward``. FSDP2 gathers the head,
      which belongs to the root, before ``forward`` and keeps it. ZeRO 3 gathers a parameter read outside its layer for
      the innermost running module, which is this one, and frees it when ``forward`` returns.
    * The outputs are tensors. ZeRO 3 and FSDP2 place hooks on them to detect the backward pass and gather the head
      again; they would miss tensors inside a ``Head``.

    Args:
        student: the model to train; a submodule, as is the trained part of the loss, if there is one.
        references: the frozen models, or None for a loss that reads none. They are not a submodule: not in the
            checkpoint, not in the optimiser, untouched by ``train()`` and ``to()``.
        loss: the loss plug-in.
        kernels: memory and precision of the loss; None: as the device allows.
        token_map: of the student's vocabulary and the teachers'; None: they share one.
        router_aux_loss_coef: in training, the weight of the loss that balances the student's experts; 0: none is added.
    """

    def __init__(
        self,
        student: LanguageModel,
        references: References | None,
        loss: Loss,
        kernels: KernelOptions | None = None,
        token_map: TokenMap | None = None,
        router_aux_loss_coef: float = 0.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.references = references
        self.loss = loss
        #: Never exported: it serves training alone.
        self.loss_part = loss.trainable
        self.kernels = kernels or KernelOptions()
        self._token_map = token_map
        self._chunk_buffers = ChunkBuffers()
        self._router_aux_loss_coef = router_aux_loss_coef

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the loss and its parts over the batch's valid tokens.

        Returns:
            The sum (nats, scalar, at least float32, differentiable in the student) and the detached sum of each part.
        """
        finish = dict if self.references is None else self.references.start(batch)
        if not (self.training and self._router_aux_loss_coef):
            return self._loss(self.student.head(batch), finish(), batch)
        student, router_loss = self.student.head_and_router_loss(batch)
        total, parts = self._loss(student, finish(), batch)
        # A micro-batch has one; by its valid tokens it becomes the step's mean, like every other part.
        router_loss = router_loss * len(batch.valid_N)
        return total + self._router_aux_loss_coef * router_loss, parts | {"router_aux_loss": router_loss.detach()}

    def _loss(
        self, student: Head, references: Mapping[str, Head] | Buckets | RoutedHeads, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.loss.needs_alignment:
            assert not isinstance(references, Buckets | RoutedHeads), "checked with the config"
            tokens = AlignedTokens.of(batch, self._token_map_on(batch))
            return aligned_loss(self.loss, {**references, STUDENT: student}, tokens, options=self.kernels)
        if isinstance(references, RoutedHeads):
            return self._sum_of_parts(student, references, batch)
        return self._sum(student, references, batch.labels_N, batch.facts_N)

    def _sum_of_parts(self, student: Head, references: RoutedHeads, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        labels, facts = batch.labels_N, batch.facts_N
        total, parts = student.hidden.new_zeros((), dtype=torch.float32), dict[str, Tensor]()
        for tokens, heads in references.parts:
            value, own = self._sum(student.at(tokens), heads, labels[tokens], facts.part(tokens))
            total = total + value
            for name, part in own.items():
                parts[name] = parts[name] + part if name in parts else part
        return total, parts

    def _sum(
        self, student: Head, references: Mapping[str, Head] | Buckets, labels: Tensor, facts: TokenFacts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        heads, buckets = ({}, references) if isinstance(references, Buckets) else (references, None)
        return chunked_loss(
            self.loss,
            {**heads, STUDENT: student},
            labels,
            buckets=buckets,
            facts=facts,
            options=self.kernels,
            # A GPU's allocator keeps memory itself, and lends it to the backward pass.
            buffers=self._chunk_buffers if labels.device.type == "cpu" else None,
        )

    def _token_map_on(self, batch: Batch) -> TokenMap:
        """Return the map on the batch's device, moved once."""
        if self._token_map is None:
            self._token_map = TokenMap.identity(self.student.vocabulary)
        if self._token_map.student_shared.device != batch.input_ids.device:
            self._token_map = self._token_map.to(batch.input_ids.device)
        return self._token_map
