"""The types that every part of deltakd speaks, and the legend of tensor names.

Tensor names end in their shape:

    B  rows of a batch                 N  valid target tokens (label != IGNORE_INDEX, after the shift)
    T  positions of a row              D  hidden size (differs between models)
    V  vocabulary of the tokenizer

So ``hidden_ND`` holds one hidden state for each valid token, ``labels_BT`` one label for each position.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

STUDENT = "student"
TEACHER = "teacher"
TEACHER_RAW = "teacher_raw"
STUDENT_RAW = "student_raw"
#: The roles of Delta-KD. Further (teacher, raw teacher) pairs are numbered: ``teacher_2``, ``teacher_raw_2``, ...
ROLES = (STUDENT, TEACHER, TEACHER_RAW, STUDENT_RAW)
_NUMBERED = re.compile(r"teacher(_raw)?_([2-9]|[1-9]\d+)")


def is_reference_role(name: str) -> bool:
    """Whether a loss may ask for a frozen model under this name."""
    return name in ROLES[1:] or _NUMBERED.fullmatch(name) is not None


def teacher_pair(number: int) -> tuple[str, str]:
    """The roles of the pair (teacher, raw teacher) of this number, from 1: the first pair has no number."""
    suffix = "" if number == 1 else f"_{number}"
    return TEACHER + suffix, TEACHER_RAW + suffix


#: The label of a position that is not trained on (prompt, padding).
IGNORE_INDEX = -100


def at_least_float32(tensor: Tensor) -> Tensor:
    """Upcast half types to float32; float32 and float64 stay as they are (DESIGN 3.6)."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def in_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64 on its device, or on the CPU where the device has no float64 (MPS)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


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

    def add_logits(self, total: Tensor | None, factor: float) -> Tensor:
        """``total + factor · logits()``, in place in ``total`` and inside the product where the head is linear."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            if self.softcap is not None:
                logits_NV = self.logits()
                return logits_NV.mul_(factor) if total is None else total.add_(logits_NV, alpha=factor)
            weight_VD = at_least_float32(self.weight)
            hidden_ND = at_least_float32(self.hidden).to(weight_VD.dtype)
            if total is None:
                total = torch.empty(len(hidden_ND), len(weight_VD), dtype=weight_VD.dtype, device=weight_VD.device)
                beta = 0.0
            else:
                beta = 1.0
            total.addmm_(hidden_ND, weight_VD.T, beta=beta, alpha=factor * self.scale)
            if self.bias is not None:
                total.add_(self.bias.to(weight_VD.dtype), alpha=factor * self.scale)
        return total


@final
class HeadLogits(Mapping[str, Tensor]):
    """Logits by role that are multiplied out when they are asked for, and sums of them in one go.

    A loss may read it like a dict. What is read by name is kept; a ``combined`` sum of roles that nobody reads by name
    costs the memory of one tensor of logits, whatever the number of roles.

    Args:
        student: [N, V] the student's logits, on the graph.
        heads: role -> Head of the references, over the same N tokens.
    """

    def __init__(self, student: Tensor, heads: Mapping[str, Head]) -> None:
        self._heads = heads
        self._made = {STUDENT: student}

    def __getitem__(self, role: str) -> Tensor:
        if role not in self._made:
            with torch.no_grad():
                self._made[role] = self._heads[role].logits()
        return self._made[role]

    def __iter__(self) -> Iterator[str]:
        return iter((STUDENT, *self._heads))

    def __len__(self) -> int:
        return 1 + len(self._heads)

    @torch.no_grad()
    def combined(self, coefficients: Mapping[str, float]) -> Tensor:
        """Σ coefficient · logits[role]: [N, V], a new tensor, detached; −inf where a head's bias rules a token out."""
        total: Tensor | None = None
        # What is there already first, so that the products can be added on top of it.
        for role in sorted(coefficients, key=lambda role: role not in self._made):
            factor = coefficients[role]
            if role in self._made:
                term = self._made[role]
                total = term * factor if total is None else total.add_(term, alpha=factor)
            else:
                total = self._heads[role].add_logits(total, factor)
        assert total is not None, "a sum of no roles"
        for role in coefficients:
            bias = self._heads[role].bias if role in self._heads else None
            if bias is not None:
                total.masked_fill_(torch.isneginf(bias), -torch.inf)
        return total


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Args:
        step: optimiser steps done.
        total_steps: optimiser steps of the whole run.
    """

    step: int
    total_steps: int


@runtime_checkable
class Schedule(Protocol):
    """A number inside a loss that changes with training; it moves once per optimiser step."""

    @property
    def value(self) -> float:
        """The number for the coming optimiser step."""
        ...

    def on_step(self, progress: Progress, reduced_loss: float) -> None:
        """An optimiser step is done; ``reduced_loss`` is its loss over all ranks and micro-batches (nats per token)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        ...


@dataclass(frozen=True)
class LossOutput:
    """What a loss says of N tokens.

    Args:
        per_token: [N] nats, at least float32; what is trained on.
        parts: name -> [N] nats: what ``per_token`` is made of, for the log.
    """

    per_token: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LinearForwardKL:
    """A loss that is λ · CE + (1 − λ) · scale · KL(softmax(Σ c_r z_r / τ) ‖ softmax(z_student / τ)).

    Args:
        coefficients: role -> c; empty where λ = 1.
        temperature: τ.
        ce_weight: λ.
        scale: τ² or 1.
        name: of the KL among the parts.
    """

    coefficients: Mapping[str, float]
    temperature: float
    ce_weight: float
    scale: float = 1.0
    name: str = "forward_kl"


@runtime_checkable
class Loss(Protocol):
    """A loss plug-in: what Hydra makes of ``conf/loss/<name>.yaml``.

    A loss that changes with time also has ``schedules``: name -> Schedule. They are moved once per optimiser step,
    logged under their name, and kept in the checkpoint. One whose ``linear_forward_kl`` is a LinearForwardKL (for
    the coming step: it may change with the schedules) may be computed by hand instead of being called.
    """

    @property
    def requires(self) -> frozenset[str]:
        """The reference roles whose logits the loss reads."""
        ...

    def __call__(self, logits: Mapping[str, Tensor], labels: Tensor) -> LossOutput:
        """Score N tokens: ``logits`` role -> [N, V] float, ``labels`` [N] int64."""
        ...


def schedules_of(loss: Loss) -> Mapping[str, Schedule]:
    """What in a loss changes with training, by name; a loss need not have any."""
    schedules: Mapping[str, Schedule] = getattr(loss, "schedules", {})
    return schedules


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
    _valid: Tensor | None = None

    @property
    def valid_BT(self) -> Tensor:
        """[B, T−1] bool: positions whose *next* token is a trained one."""
        return self.labels[:, 1:] != IGNORE_INDEX

    @property
    def valid_N(self) -> Tensor:
        """[N] int64, where in the flattened [B, T] the valid tokens are predicted, in row-major order.

        Searched for once, before the batch moves: on a GPU each search waits until all work before it is done.
        """
        if self._valid is None:
            row_N, position_N = torch.where(self.valid_BT)
            self._valid = row_N * self.labels.shape[1] + position_N
        return self._valid

    @property
    def labels_N(self) -> Tensor:
        """[N] the trained tokens, in row-major order."""
        return self.labels.flatten()[self.valid_N + 1]

    def at_valid(self, values_BTD: Tensor) -> Tensor:
        """[N, D] the values at the positions from which the trained tokens are predicted."""
        return values_BTD.flatten(0, 1)[self.valid_N]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            attention_mask=self.attention_mask.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            row_ids=self.row_ids.to(device, non_blocking=non_blocking),
            _valid=self.valid_N.to(device, non_blocking=non_blocking),
        )
