"""The types that every part of deltakd speaks, and the legend of tensor names.

Tensor names end in their shape:

    B  rows of a batch                 N  valid target tokens (label != IGNORE_INDEX, after the shift)
    T  positions of a row              D  hidden size (differs between models)
    V  vocabulary of the tokenizer

So ``hidden_ND`` holds one hidden state for each valid token, ``labels_BT`` one label for each position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

STUDENT = "student"
TEACHER = "teacher"
TEACHER_RAW = "teacher_raw"
STUDENT_RAW = "student_raw"
#: The frozen models that a loss may ask for.
REFERENCE_ROLES = (TEACHER, TEACHER_RAW, STUDENT_RAW)
ROLES = (STUDENT, *REFERENCE_ROLES)

#: The label of a position that is not trained on (prompt, padding).
IGNORE_INDEX = -100


def at_least_float32(tensor: Tensor) -> Tensor:
    """Upcast half types to float32; float32 and float64 stay as they are (DESIGN 3.6)."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@dataclass(frozen=True)
class Head:
    """Logits that have not been multiplied out yet.

    logits = softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap), without the tanh where ``softcap`` is None.

    Args:
        hidden: [N, D] last hidden states of the valid tokens.
        weight: [V, D] rows of the output embedding, cut to the vocabulary of the tokenizer.
        bias: [V] or None.
        softcap: the bound of Gemma2's soft-capping, or None.
        scale: factor on the logits (Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def rows(self, start: int, stop: int) -> Head:
        """The head of tokens ``start`` to ``stop`` (exclusive)."""
        return Head(self.hidden[start:stop], self.weight, self.bias, self.softcap, self.scale)

    def upcast(self) -> Head:
        """The same head with weight and bias in at least float32, so that chunks do not each convert them again."""
        bias = None if self.bias is None else at_least_float32(self.bias)
        return Head(self.hidden, at_least_float32(self.weight), bias, self.softcap, self.scale)

    def logits(self) -> Tensor:
        """Multiply out: [N, V] in at least float32, with autocast off (DESIGN 3.6)."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            weight_VD = at_least_float32(self.weight)
            logits_NV = at_least_float32(self.hidden).to(weight_VD.dtype) @ weight_VD.T
            if self.bias is not None:
                logits_NV = logits_NV + self.bias.to(weight_VD.dtype)
            if self.scale != 1.0:
                logits_NV = logits_NV * self.scale
            if self.softcap is not None:
                logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


@dataclass(frozen=True)
class LossOutput:
    """What a loss says of N tokens.

    Args:
        per_token: [N] nats, at least float32; what is trained on.
        parts: name -> [N] nats: what ``per_token`` is made of, for the log.
    """

    per_token: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Loss(Protocol):
    """A loss plug-in: what Hydra makes of ``conf/loss/<name>.yaml``."""

    @property
    def requires(self) -> frozenset[str]:
        """The reference roles whose logits the loss reads."""
        ...

    def __call__(self, logits: Mapping[str, Tensor], labels: Tensor) -> LossOutput:
        """Score N tokens: ``logits`` role -> [N, V] float, ``labels`` [N] int64."""
        ...


@dataclass
class Batch:
    """Rows of one micro-batch, padded on the right.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 1 on real tokens.
        labels: [B, T] int64; the token itself where it is trained on, else IGNORE_INDEX. Not shifted: position t
            is predicted from the hidden state at t − 1.
        row_ids: [B] int64, the row's number in its data set.
        step: the optimiser step (from 0) that this micro-batch belongs to.
        step_tokens: valid tokens of that whole optimiser step, over all ranks and micro-batches.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    row_ids: Tensor
    step: int
    step_tokens: int

    @property
    def valid_BT(self) -> Tensor:
        """[B, T−1] bool: positions whose *next* token is a trained one."""
        return self.labels[:, 1:] != IGNORE_INDEX

    @property
    def labels_N(self) -> Tensor:
        """[N] the trained tokens, in row-major order."""
        return self.labels[:, 1:][self.valid_BT]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            attention_mask=self.attention_mask.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            row_ids=self.row_ids.to(device, non_blocking=non_blocking),
        )
