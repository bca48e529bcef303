"""A target of two tokenizers: the teacher's shift, carried into the student's vocabulary. Ours, not from a paper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from deltakd.losses.carrying import Carrier
from deltakd.losses.sampled import of_labels
from deltakd.losses.schedules import ScheduleSetting, is_zero, make_schedule, moving
from deltakd.losses.spans import Side, sides_of, tokens_of
from deltakd.losses.targets import Target, compose
from deltakd.losses.treatments import NO_TREATMENT, Treatment, difference, log_probs_of, ruled_out
from deltakd.types import STUDENT_RAW, TEACHER, TEACHER_RAW, AlignedTokens, Schedule, TokenMap, require_kind

_PAIR = (TEACHER, TEACHER_RAW)


@final
class SpanShiftTarget(Target):
    """z = log p_s0 + β · δ, δ the shift log p_t − log p_t0 in the student's vocabulary (ours).

    Both teachers share one vocabulary, and their shift is formed of what they say in it
    (docs/design.md#two-tokenizers):

    * At the first token of a span all models have read the same text. There the probability of each of the teachers'
      tokens goes to the student's token that begins its text, and δ is the difference of the logs.
    * A label that is longer than the teachers' first token gets the probability of all their tokens in the span.
    * Inside a span of several tokens of the student, the teachers say only how likely the span's text goes on as it
      does. δ then tells the label from everything else, so that the δ of the span's labels sum to that of its text.
    * Everywhere else δ = 0: the student keeps its own distribution.

    With one tokenizer this is ``shift_target``.

    Args:
        delta_weight: β. Always 0: the raw student alone is read.
        treatment: of δ; centre and mask read the carried probabilities, and act on first tokens only.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, delta_weight: ScheduleSetting = 1.0, treatment: Treatment = NO_TREATMENT) -> None:
        self._weight = make_schedule(delta_weight, "delta_weight")
        require_kind(treatment, Treatment, "loss.target.treatment")
        allowed = {TEACHER, TEACHER_RAW, STUDENT_RAW}
        if foreign := sorted(treatment.requires - allowed):
            raise ValueError(f"loss.target.treatment reads {foreign[0]}; allowed: {', '.join(sorted(allowed))}")
        self.treatment = treatment
        self._carrier: tuple[TokenMap, Carrier] | None = None

    @property
    def requires(self) -> frozenset[str]:
        """The raw student; both teachers unless β is always 0."""
        return frozenset({STUDENT_RAW} if is_zero(self._weight) else {STUDENT_RAW, *_PAIR})

    @property
    def needs_alignment(self) -> bool:  # type: ignore[override]
        """True unless β is always 0."""
        return not is_zero(self._weight)

    @property
    def coefficients(self) -> Mapping[str, float] | None:
        """The raw student, if β is always 0; else None."""
        return {STUDENT_RAW: 1.0} if is_zero(self._weight) else None

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """β, if it changes."""
        return moving(delta_weight=self._weight)

    @property
    def whole_vocabulary_reasons(self) -> tuple[str, ...]:
        """A shift is carried from all tokens of one vocabulary to all of the other."""
        return () if is_zero(self._weight) else ("a shift is carried from one whole vocabulary to another",)

    @torch.no_grad()
    def __call__(self, logits: Mapping[str, Tensor]) -> Tensor:
        """[N, V] target logits at τ = 1, detached."""
        if is_zero(self._weight):
            return compose({STUDENT_RAW: 1.0}, logits)
        tokens = tokens_of(logits)
        log_s0_NV = log_probs_of({STUDENT_RAW}, logits)[STUDENT_RAW]
        student, other = sides_of(tokens.alignment)
        if not len(student.start):
            return log_s0_NV
        carrier = self._carrier_of(tokens.token_map)
        spans = {
            role: _carried(log_p_MV, tokens, student, other, carrier)
            for role, log_p_MV in log_probs_of(set(_PAIR), logits).items()
        }
        target_NV = log_s0_NV.clone()
        shift_KV = self._shift_at_starts(spans, log_s0_NV[student.start], tokens, student, carrier)
        target_NV[student.start] += self._weight.value * shift_KV
        # As in every target, no mass on a token that a model rules out; one to one, where the map is.
        out_KV = ruled_out(_PAIR, {role: logits[role][other.start] for role in _PAIR})
        rows_KV = torch.zeros_like(shift_KV, dtype=torch.bool)
        rows_KV[:, tokens.token_map.student_shared] = out_KV[:, tokens.token_map.other_shared]
        target_NV[student.start] = target_NV[student.start].masked_fill(rows_KV, -math.inf)
        return self._with_shift_inside(target_NV, spans, tokens.student.labels, student)

    def _carrier_of(self, token_map: TokenMap) -> Carrier:
        if self._carrier is None or self._carrier[0] is not token_map:
            self._carrier = (token_map, Carrier.of(token_map))
        return self._carrier[1]

    def _shift_at_starts(
        self,
        spans: Mapping[str, _Carried],
        log_s0_KV: Tensor,
        tokens: AlignedTokens,
        student: Side,
        carrier: Carrier,
    ) -> Tensor:
        """Return δ at the first tokens of spans, treated: [K, V of the student]."""
        to, origin = spans[TEACHER], spans[TEACHER_RAW]
        shift_KV = difference(to.log_probs, origin.log_probs)
        shift_KV[:, carrier.empty] = difference(to.beginnings, origin.beginnings)
        label_K = tokens.student.labels[student.start]
        shift_KV.scatter_(1, label_K[:, None], difference(to.label, origin.label)[:, None])
        log_probs = {TEACHER: to.log_probs, TEACHER_RAW: origin.log_probs, STUDENT_RAW: log_s0_KV}
        shift_KV = self.treatment(shift_KV, log_probs)
        implausible_KV = self.treatment.implausible(log_probs)
        return shift_KV if implausible_KV is None else shift_KV.masked_fill(implausible_KV, 0.0)

    def _with_shift_inside(
        self, target_NV: Tensor, spans: Mapping[str, _Carried], labels_N: Tensor, student: Side
    ) -> Tensor:
        """Add δ at the later tokens of the student's spans."""
        count_K = student.stop - student.start - 1
        for offset in range(1, student.longest):
            inside_K = student.longer_than(offset)
            place_K = student.start[inside_K] + offset
            # The rest of the span, in equal parts to its later tokens.
            log_p, log_p0 = (spans[role].rest[inside_K] / count_K[inside_K] for role in _PAIR)
            on_label_K = difference(log_p, log_p0)
            elsewhere_K = difference(_log1mexp(log_p), _log1mexp(log_p0))
            if self.treatment.clip is not None:
                on_label_K, elsewhere_K = (
                    shift_K.clamp(-self.treatment.clip, self.treatment.clip) for shift_K in (on_label_K, elsewhere_K)
                )
            rows_KV = elsewhere_K[:, None].expand(-1, target_NV.shape[1]).clone()
            rows_KV.scatter_(1, labels_N[place_K][:, None], on_label_K[:, None])
            target_NV[place_K] += self._weight.value * rows_KV
        return target_NV


@dataclass(frozen=True)
class _Carried:
    """One model's probabilities at spans, in logs.

    Args:
        log_probs: [K, V] at the first token of each span, in the student's vocabulary; −inf: nothing belongs to it.
        beginnings: [K, E] of the teachers' tokens that begin the text of the student's tokens to which nothing belongs.
        label: [K] of the student's first label.
        rest: [K] of the span's text, given that label.
    """

    log_probs: Tensor
    beginnings: Tensor
    label: Tensor
    rest: Tensor


def _carried(log_p_MV: Tensor, tokens: AlignedTokens, student: Side, other: Side, carrier: Carrier) -> _Carried:
    first_KV = log_p_MV[other.start]
    first_label_K, label_K = tokens.other.labels[other.start], tokens.student.labels[student.start]
    later_K = other.sums(of_labels(log_p_MV, tokens.other.labels), skip_first=True)
    log_first_K = of_labels(first_KV, first_label_K)
    span_K = log_first_K + later_K
    beginnings_KV = first_KV[:, carrier.beginnings]
    # Where the student's label is not the token that begins the teachers' first one, the span's text goes to the label.
    moves_K = tokens.token_map.student_of_other[first_label_K] != label_K
    left_K = torch.where(moves_K, log_first_K + _log1mexp(later_K), log_first_K)
    log_p_KV = carrier.carried(first_KV.scatter(1, first_label_K[:, None], left_K[:, None]))
    carried_label_K = of_labels(log_p_KV, label_K)
    on_label_K = torch.where(moves_K, torch.logaddexp(carried_label_K, span_K), carried_label_K)
    log_p_KV = log_p_KV.scatter(1, label_K[:, None], on_label_K[:, None])
    # A label that the model rules out leaves nothing to say of the rest.
    rest_K = (span_K - on_label_K).masked_fill(torch.isneginf(on_label_K), 0.0).clamp_max(0.0)
    return _Carried(log_p_KV, beginnings_KV, on_label_K, rest_K)


def _log1mexp(log_p: Tensor) -> Tensor:
    """log(1 − p) from log p ≤ 0, exact near both ends; −inf at p = 1."""
    near_one = log_p > -math.log(2.0)
    return torch.where(near_one, (-torch.expm1(log_p)).log(), torch.log1p(-log_p.exp()))


def span_shift_target(delta_weight: ScheduleSetting = 1.0, treatment: Treatment = NO_TREATMENT) -> SpanShiftTarget:
    """Return the target of ``delta_span``; arguments as for ``SpanShiftTarget``."""
    return SpanShiftTarget(delta_weight, treatment)
