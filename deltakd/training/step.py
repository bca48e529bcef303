"""One step: the heads of student and references, and the loss summed over them."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from deltakd.kernels import MEMORY_BUDGET, Buckets, chunked_loss
from deltakd.models import LanguageModel
from deltakd.references import References
from deltakd.types import STUDENT, Batch, Loss


@final
class DistillationStep(nn.Module):
    """Student, references and loss: the one module that a strategy shards, in training and in validation.

    The head is multiplied chunk by chunk inside the loss, outside the layer that owns it. A strategy that shards has to
    keep it whole until then, and for its gradient. Two things see to that:

    * From the references' first layer to the loss, everything happens in this module's ``forward``. FSDP2 gathers the
      head, which belongs to the root, before ``forward`` and keeps it; ZeRO 3 gathers a parameter that is read outside
      its layer for the innermost module that is running, which is this one, and frees it when its ``forward`` returns.
    * What comes out are tensors. By hooks on them ZeRO 3 and FSDP2 know when the backward pass comes back, and gather
      the head again; tensors inside a ``Head`` would go unseen.

    Args:
        student: the model to train, its only submodule.
        references: the frozen models, or None for a loss that reads none. They are no submodule: not in the
            checkpoint, not in the optimiser, untouched by ``train()`` and ``to()``.
        loss: the loss plug-in.
        memory_budget: MiB for a chunk of logits and everything made of them.
    """

    def __init__(
        self,
        student: LanguageModel,
        references: References | None,
        loss: Loss,
        memory_budget: float = MEMORY_BUDGET,
    ) -> None:
        super().__init__()
        self.student = student
        self.references = references
        self.loss = loss
        self.memory_budget = memory_budget

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the loss and its parts over the batch's valid tokens.

        Returns:
            The sum (nats, scalar, at least float32, differentiable in the student) and the detached sum of each part.
        """
        finish = dict if self.references is None else self.references.start(batch)
        student = self.student.head(batch)
        references = finish()
        heads, buckets = ({}, references) if isinstance(references, Buckets) else (references, None)
        heads = {**heads, STUDENT: student}
        return chunked_loss(self.loss, heads, batch.labels_N, memory_budget=self.memory_budget, buckets=buckets)
