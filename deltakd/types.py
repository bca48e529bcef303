"""The types that all parts of deltakd share, and the legend of tensor names.

Tensor names end in their shape:

    B  rows of a batch                 N  valid target tokens (label != IGNORE_INDEX, after the shift)
    T  positions of a row              D  hidden size (differs between models)
    V  vocabulary of the tokenizer

So ``hidden_ND`` holds one hidden state for each valid token, ``labels_BT`` one label for each position.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
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
    """True if a loss may ask for a frozen model of this name."""
    return name in ROLES[1:] or _NUMBERED.fullmatch(name) is not None


def teacher_pair(number: int) -> tuple[str, str]:
    """Return the roles (teacher, raw teacher) of a pair, counted from 1: the first pair's roles carry no number."""
    suffix = "" if number == 1 else f"_{number}"
    return TEACHER + suffix, TEACHER_RAW + suffix


#: The label of a position that is not trained on (prompt, padding).
IGNORE_INDEX = -100


def at_least_float32(tensor: Tensor) -> Tensor:
    """Upcast half types to float32; float32 and float64 stay as they are (docs/design.md#numerics)."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def in_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64 on its device, or on the CPU where the device has no float64 (MPS)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


@dataclass(frozen=True)
class Head:
    """Logits that are not computed yet: hidden states and output embedding.

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
        """Return the head of tokens ``start`` to ``stop`` (exclusive)."""
        return Head(self.hidden[start:stop], self.weight, self.bias, self.softcap, self.scale)

    def upcast(self) -> Head:
        """Return the head with weight and bias in at least float32, so that chunks need not each convert them."""
        bias = None if self.bias is None else at_least_float32(self.bias)
        return Head(self.hidden, at_least_float32(self.weight), bias, self.softcap, self.scale)

    def logits(self) -> Tensor:
        """Return the logits, [N, V] in at least float32, computed with autocast off (docs/design.md#numerics)."""
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
        """Return ``total + factor · logits()``, added in place; a linear head adds inside the matrix product."""
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
    """Logits by role, computed on first access, and weighted sums of them.

    A loss may read it like a dict. Logits read by name are kept. A ``combined`` sum of roles that nobody reads by name
    takes the memory of one tensor of logits, for any number of roles.

    Args:
        student: [N, V] the student's logits, on the graph.
        heads: role -> Head of the references, over the same N tokens.
        sampled_log_probs: [N] nats, the log-probs that the labels had when an earlier student sampled them; None: they
            were not sampled, or by the student as it is.
    """

    def __init__(self, student: Tensor, heads: Mapping[str, Head], sampled_log_probs: Tensor | None = None) -> None:
        self._heads = heads
        self._made = {STUDENT: student}
        self.sampled_log_probs = sampled_log_probs

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
        """Return Σ coefficient · logits[role]: [N, V], new and detached; −inf where a head's bias rules a token out."""
        total: Tensor | None = None
        # Computed logits first: the other heads' products are then added in place.
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
        total_steps: optimiser steps in the whole run.
    """

    step: int
    total_steps: int


@runtime_checkable
class Schedule(Protocol):
    """A number in a loss that changes during training, once per optimiser step."""

    @property
    def value(self) -> float:
        """The number for the coming optimiser step."""
        ...

    def on_step(self, progress: Progress, reduced_loss: float) -> None:
        """Move on after an optimiser step.

        Args:
            progress: how far training is now.
            reduced_loss: the step's loss over all ranks and micro-batches, in nats per token.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to continue exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class LossOutput:
    """The value of a loss on N tokens.

    Args:
        per_token: [N] nats, at least float32; training minimises the mean.
        parts: name -> [N] nats: the terms of ``per_token``, for the log.
    """

    per_token: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate:
    """Logits with a weight per token: exp(−KL(p_to ‖ p_origin) / nats) · Σ c_r z_r, the probabilities at τ = 1.

    Args:
        nats: the scale of the KL, above 0.
        to, origin: roles.
        coefficients: role -> c_r.
        name: the weight's name in ``parts``.
    """

    nats: float
    to: str
    origin: str
    coefficients: Mapping[str, float]
    name: str


@dataclass(frozen=True)
class LinearKL:
    """The coefficients of λ · CE + (1 − λ) · scale · KL(softmax(Σ c_r z_r / τ) ‖ softmax(z_student / τ)).

    Args:
        coefficients: role -> c_r; empty if λ = 1.
        temperature: τ.
        ce_weight: λ.
        scale: τ² or 1.
        name: the KL's name in ``parts``.
        reverse: KL(student ‖ target) instead.
        gate: logits with a weight per token, added to the target's.
    """

    coefficients: Mapping[str, float]
    temperature: float
    ce_weight: float
    scale: float = 1.0
    name: str = "forward_kl"
    reverse: bool = False
    gate: Gate | None = None

    @property
    def kind(self) -> str:
        """``fused`` or ``gated``: how many tensors of logits a kernel holds."""
        return "fused" if self.gate is None else "gated"


class Loss(ABC):
    """A loss plug-in, built by Hydra from ``conf/loss/<name>.yaml``.

    To write your own, subclass it and define ``requires`` and ``__call__``. Everything else has a default. The config,
    the kernels and the reference stores ask a loss what it can do, never what type it is.
    """

    #: τ at which the loss reads the references; a top-K store holds log-probs at this temperature.
    temperature: float = 1.0

    #: True if the loss scores whole sequences, such as a policy gradient or a sequence-level KL on sampled answers:
    #: ``per_token`` then depends on the other tokens of the row, so tokens must not be cut into chunks or dropped.
    #: No loss sets it yet, and nothing reads it yet.
    needs_whole_sequences: bool = False

    #: True if the labels must be tokens that the student sampled itself (``rollout=student``).
    needs_sampled_tokens: bool = False

    #: True if the loss compares models with different tokenizers: it then reads an alignment of their tokens, and
    #: logits may differ in V. No loss sets it yet, and nothing reads it yet.
    needs_alignment: bool = False

    @property
    @abstractmethod
    def requires(self) -> frozenset[str]:
        """The reference roles whose logits the loss reads; no other reference is loaded."""

    @abstractmethod
    def __call__(self, logits: Mapping[str, Tensor], labels: Tensor) -> LossOutput:
        """Score N tokens.

        Args:
            logits: role -> [N, V] float, for ``student`` and every role in ``requires``.
            labels: [N] int64.
        """

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The schedules inside the loss, by the name under which they are logged; checkpoints hold their state."""
        return {}

    @property
    def fused_form(self) -> LinearKL | None:
        """The loss at the coming step as ``deltakd.kernels.fused`` computes it; None: autograd does."""
        return None

    @property
    def distillation_term(self) -> Loss:
        """The part of the loss that reads references, by which a store of them is judged; by default the whole loss."""
        return self

    @property
    def whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """Why the loss needs more than K tokens and one bucket for the rest, one clause per reason.

        Empty if a top-K store of references can serve the loss. By default only temperature 1 allows that: at another τ
        the logits over buckets are τ · log-probs at τ, which the loss must take into account.
        """
        if self.temperature == 1.0:
            return ()
        return (f"a loss of your own needs temperature 1, and its temperature is {self.temperature:g}",)

    @property
    @final
    def needs_whole_vocabulary(self) -> bool:
        """True if the loss can't be computed over K tokens and one bucket for the rest."""
        return bool(self.whole_vocabulary_reasons)


def require_kind(thing: object, kind: type | tuple[type, ...], key: str) -> None:
    """Check that a plug-in is what the config key needs.

    Args:
        thing: what the config gave.
        kind: the base class that it has to have, or several of which it has to have one.
        key: the config key, for the message.

    Raises:
        ValueError: it is something else; the message says what, and what to do.
    """
    if isinstance(thing, kind):
        return
    if hasattr(thing, "__qualname__"):
        what = f"the {'class' if isinstance(thing, type) else 'function'} {thing.__module__}.{thing.__qualname__}"
    elif isinstance(thing, str | int | float | list | dict | None):
        what = repr(thing)
    else:
        what = f"an object of {type(thing).__module__}.{type(thing).__qualname__}"
    kinds = kind if isinstance(kind, tuple) else (kind,)
    raise ValueError(
        f"{key} is {what}, not a {' or '.join(f'{one.__module__}.{one.__qualname__}' for one in kinds)}; name one that "
        f"is ready-made, or a subclass of {' or '.join(one.__name__ for one in kinds)} as its _target_"
    )


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
        step_tokens: valid tokens in that whole optimiser step, over all ranks and micro-batches.
        sampled_log_probs: [B, T] float32 nats: of each label when an earlier student sampled it, 0 elsewhere; None: as
            for ``HeadLogits``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    row_ids: Tensor
    step: int
    step_tokens: int
    sampled_log_probs: Tensor | None = None
    _valid: Tensor | None = None

    @property
    def valid_BT(self) -> Tensor:
        """[B, T−1] bool: True where the *next* token is trained on."""
        return self.labels[:, 1:] != IGNORE_INDEX

    @property
    def valid_N(self) -> Tensor:
        """[N] int64: indices into the flattened [B, T] where the valid tokens are predicted, in row-major order.

        Computed once, before the batch moves: on a GPU the search forces a synchronisation.
        """
        if self._valid is None:
            row_N, position_N = torch.where(self.valid_BT)
            self._valid = row_N * self.labels.shape[1] + position_N
        return self._valid

    @property
    def labels_N(self) -> Tensor:
        """[N] int64: the tokens trained on, in row-major order."""
        return self.labels.flatten()[self.valid_N + 1]

    @property
    def sampled_log_probs_N(self) -> Tensor | None:
        """[N] float32 nats, of ``labels_N``; None: see ``sampled_log_probs``."""
        return None if self.sampled_log_probs is None else self.sampled_log_probs.flatten()[self.valid_N + 1]

    def at_valid(self, values_BTD: Tensor) -> Tensor:
        """Return [N, D], the values at the positions that predict the valid tokens."""
        return values_BTD.flatten(0, 1)[self.valid_N]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            attention_mask=self.attention_mask.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            row_ids=self.row_ids.to(device, non_blocking=non_blocking),
            sampled_log_probs=None
            if self.sampled_log_probs is None
            else self.sampled_log_probs.to(device, non_blocking=non_blocking),
            _valid=self.valid_N.to(device, non_blocking=non_blocking),
        )
