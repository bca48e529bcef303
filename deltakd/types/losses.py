"""The interface of losses: their values, and the properties they declare."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, SupportsFloat, final, runtime_checkable

from torch import Tensor, nn

from deltakd.types.alignment import TokenMap
from deltakd.types.heads import Head, TokenFacts
from deltakd.types.two_sides import AlignedTokens


@dataclass(frozen=True)
class Progress:
    """The progress of training.

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

    def on_step(self, progress: Progress, reduced_loss: SupportsFloat) -> None:
        """Move on after an optimiser step.

        Args:
            progress: the current progress of training.
            reduced_loss: the step's loss over all ranks and micro-batches, in nats per token. ``float(reduced_loss)``
                waits for a GPU to compute it; only a schedule that moves with the loss should.
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
        parts: name -> [N] nats: the terms of ``per_token``, for the log; [M] for terms of ``per_other_token``.
        per_other_token: [M] nats on the teachers' tokens, in a loss of two tokenizers. They join the sum; the mean is
            still over the student's tokens.
    """

    per_token: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    per_other_token: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The sum over all tokens, in nats: a scalar."""
        total = self.per_token.sum()
        return total if self.per_other_token is None else total + self.per_other_token.sum()


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
class MixtureKL:
    """a · KL(P ‖ M) + b · KL(Q ‖ M) with M = μ P + (1 − μ) Q, P the target and Q the student.

    Args:
        of_target: a.
        of_student: b.
        share: μ, in (0, 1).
    """

    of_target: float
    of_student: float
    share: float

    @property
    def bound(self) -> float:
        """The largest absolute value of its gradient w.r.t. a logit at τ = 1.

        The gradient is Q (g − E_Q[g]) with g = b log(Q / M) − (1 − μ) (a P + b Q) / M. As M ≥ (1 − μ) Q and M ≥ μ P,
        g is at most −b log(1 − μ), Q |log(Q / M)| at most 1 − log(1 − μ), and (1 − μ) Q (a P + b Q) / M at most a + b.
        """
        return 2 * (self.of_target + self.of_student * (2 - math.log1p(-self.share)))


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
        mixture: this divergence instead.
        gate: logits with a weight per token, added to the target's.
    """

    coefficients: Mapping[str, float]
    temperature: float
    ce_weight: float
    scale: float = 1.0
    name: str = "forward_kl"
    reverse: bool = False
    gate: Gate | None = None
    mixture: MixtureKL | None = None

    @property
    def kind(self) -> str:
        """``fused`` or ``gated``: how many tensors of logits a kernel holds."""
        return "fused" if self.gate is None else "gated"


class Loss(ABC):
    """A loss plug-in, built by Hydra from ``conf/loss/<name>.yaml``.

    To write your own, subclass it and define ``requires`` and ``__call__``. Everything else has a default. The config,
    the kernels and the reference stores ask a loss about its capabilities, never its type.
    """

    #: τ at which the loss reads the references; a top-K store holds log-probs at this temperature.
    temperature: float = 1.0

    #: λ, the weight of the labels' cross-entropy; 0 for a loss without one.
    ce_weight: float = 0.0

    #: True if ``per_token`` depends on the other tokens of the row; the loss is then a ``SequenceLoss``.
    needs_whole_sequences: bool = False

    #: True if the labels must be tokens sampled by the student itself (``rollout=student``).
    needs_sampled_tokens: bool = False

    #: True if the loss weighs tokens that an earlier student sampled by π_θ / π_sampled without a bound.
    has_unbounded_ratios: bool = False

    #: True if the loss compares the data's response with the student's: rows come in pairs (``Batch.pairs``).
    needs_pairs: bool = False

    #: True if the loss compares models with different tokenizers. ``logits`` is then an ``AlignedLogits``: those of
    #: teachers are [M, V'] over their own tokens, and its ``tokens`` say how both sides correspond.
    needs_alignment: bool = False

    #: The part of the loss that is trained with the student, once ``prepare`` has made it; None: nothing is.
    trainable: nn.Module | None = None

    #: Peak learning rate of ``trainable``; None: the student's.
    trainable_lr: float | None = None

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

    def prepare(self, heads: Mapping[str, Head], token_map: TokenMap, seed: int) -> nn.Module | None:
        """Make ``trainable``, the same for the same arguments on every rank, and return it. By default there is none.

        Args:
            heads: role -> Head over no tokens: what sizes and output embeddings a loss may want to know.
            token_map: of the two vocabularies.
            seed: of random initial values.
        """
        return self.trainable

    def aligned(self, tokens: AlignedTokens) -> AlignedTokens:
        """Return the tokens of a whole micro-batch under the alignment that the loss uses; by default the given one."""
        return tokens

    def derived_heads(self, heads: Mapping[str, Head], tokens: AlignedTokens) -> Mapping[str, Head]:
        """Return further heads, whose hidden states the loss computes; by default none.

        For a loss that ``needs_alignment``. Gradients flow to the hidden states only.

        Args:
            heads: role -> Head of a whole micro-batch.
            tokens: of that micro-batch.

        Returns:
            name -> Head. A name that begins with a teacher's role stands for logits over the teachers' M tokens, any
            other for logits over the student's N.
        """
        return {}

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The schedules inside the loss, by their names in the log; checkpoints hold their state."""
        return {}

    @property
    def fused_form(self) -> LinearKL | None:
        """The loss at the coming step as ``deltakd.kernels.fused`` computes it; None: autograd does."""
        return None

    @property
    def distillation_term(self) -> Loss:
        """The part of the loss that reads references, used to judge a store of them; by default the whole loss."""
        return self

    @property
    def teacher_factor(self) -> float:
        """The largest factor that the target puts on the teacher's logits during the run; above 1 it extrapolates."""
        return 1.0

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


class SequenceLoss(Loss):
    """A loss of whole responses: a token's worth depends on the other tokens of its row.

    It takes two passes over the tokens. The first scores each token separately, without gradients; the scores of each
    row become weights. The second pass is as for any loss, with the weights in ``logits.facts.weights``.
    """

    needs_whole_sequences = True

    @abstractmethod
    def token_rewards(self, logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Score N tokens separately: [N] nats, detached."""

    @abstractmethod
    def sequence_weights(self, rewards: Tensor, facts: TokenFacts) -> Tensor:
        """Turn rewards into weights.

        Args:
            rewards: [N], as from ``token_rewards``, with each row's tokens in order.
            facts: about the N tokens; their rows are known.

        Returns:
            [N] or [N, k], for ``logits.facts.weights``.
        """


def require_kind(thing: object, kind: type | tuple[type, ...], key: str) -> None:
    """Check that a plug-in has the type that the config key needs.

    Args:
        thing: the object that the config gave.
        kind: the required base class, or several, one of which is required.
        key: the config key, for the message.

    Raises:
        ValueError: it has another type; the message names it and the remedy.
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
