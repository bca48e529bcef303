"""The gated delta target: a separate weight for each position (docs/design.md#plane). Ours, not from a paper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from deltakd.losses.divergences import kl
from deltakd.losses.schedules import ScheduleSetting, is_zero, make_schedule, moving
from deltakd.losses.targets import Target, compose
from deltakd.losses.treatments import difference, log_probs_of, ruled_out
from deltakd.types import STUDENT_RAW, TEACHER, TEACHER_RAW, Gate, Schedule

_ROLES = frozenset({TEACHER, STUDENT_RAW, TEACHER_RAW})


@final
class GatedDeltaTarget(Target):
    """z_t0 + α g (z_s0 − z_t0) + v (z_t − z_t0), g = exp(−KL(p_t ‖ p_t0) / c), at τ = 1 (docs/design.md#plane; ours).

    Where fine-tuning left the teacher as it was, g is near 1 and the target keeps the student's own distribution, as
    ``delta_target`` does; where fine-tuning moved it far, the raw models know little, and g near 0 leaves the teacher.
    At v = 1 it is ``delta_target`` for c → ∞, and the teacher for c → 0; at other v, ``bilinear_target`` for c → ∞.

    This is the definition. In training, under forward or reverse KL, ``deltakd.kernels.fused.fused_chunk`` composes the
    target; ``tests/kernels/test_chunked.py`` shows that both agree (``test_every_loss_by_name``).

    Args:
        delta_weight: α. Always 0, at v = 1: the teacher alone is read.
        gate_nats: c > 0, in nats; infinity is allowed.
        v: the factor on the teacher's shift, which is not gated.

    Raises:
        ValueError: ``gate_nats`` is not above 0, or v not finite.
    """

    #: The name under which the mean of g is logged.
    GATE = "delta_gate"

    def __init__(self, delta_weight: ScheduleSetting = 1.0, gate_nats: float = 1.0, v: float = 1.0) -> None:
        if not gate_nats > 0:
            raise ValueError(
                f"loss.target.gate_nats is {gate_nats}; it must be above 0 (large: loss=delta_kd, small: loss=kd)"
            )
        if not math.isfinite(v):
            raise ValueError(f"loss.target.v is {v}; it must be finite (1 is the teacher's whole shift)")
        self._weight = make_schedule(delta_weight, "delta_weight")
        self._v = float(v)
        self.gate_nats = float(gate_nats)

    @property
    def requires(self) -> frozenset[str]:
        """All three; without α the raw teacher if v is not 1, and the teacher if it is not 0."""
        return frozenset(self.coefficients) if is_zero(self._weight) else _ROLES

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """α, if it changes."""
        return moving(delta_weight=self._weight)

    @property
    def coefficients(self) -> dict[str, float]:
        """The ungated part of the target: the teacher's logits at v = 1."""
        parts = {TEACHER: self._v, TEACHER_RAW: 1.0 - self._v}
        return {role: factor for role, factor in parts.items() if factor}

    @property
    def gate(self) -> Gate | None:
        """The gated part for the coming step; None if α is always 0."""
        if is_zero(self._weight):
            return None
        alpha = self._weight.value
        return Gate(self.gate_nats, TEACHER, TEACHER_RAW, {STUDENT_RAW: alpha, TEACHER_RAW: -alpha}, self.GATE)

    def with_parts(self, logits: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """[N, V] target logits, and the gate, [N] in [0, 1]."""
        if is_zero(self._weight):
            return compose(self.coefficients, logits), {}
        with torch.no_grad():
            log_probs = log_probs_of(_ROLES, logits)
            gate_N = (-kl(log_probs[TEACHER], log_probs[TEACHER_RAW]).clamp_min(0.0) / self.gate_nats).exp()
            shift_NV = difference(log_probs[STUDENT_RAW], log_probs[TEACHER_RAW])
            target_NV = compose(self.coefficients, log_probs) + (self._weight.value * gate_N)[:, None] * shift_NV
            return target_NV.masked_fill(ruled_out(sorted(_ROLES), logits), -torch.inf), {self.GATE: gate_N}

    def __call__(self, logits: Mapping[str, Tensor]) -> Tensor:
        """[N, V] target logits at τ = 1, detached."""
        return self.with_parts(logits)[0]


def gated_delta_target(delta_weight: ScheduleSetting = 1.0, gate_nats: float = 1.0, v: float = 1.0) -> GatedDeltaTarget:
    """Return the gated delta target; arguments as for ``GatedDeltaTarget``."""
    return GatedDeltaTarget(delta_weight, gate_nats, v)
