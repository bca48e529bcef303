"""From heads to buckets, which losses may be had from them, and what that costs in accuracy."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltakd.kernels import Buckets, chunk_size_for, chunked_loss, row_blocks
from deltakd.losses import AlphaBeta, LogitMatching, LogitMSE, RatioMatching, ShiftedTarget, Treatment
from deltakd.losses.mixing import LabelMixture
from deltakd.types import STUDENT, STUDENT_RAW, TEACHER, TEACHER_RAW, Head, Loss, at_least_float32, in_float64

#: K's that are tried where the config gives none.
CANDIDATES = (8, 16, 32, 64, 128, 256, 512, 1024)
#: MiB for the log-probs of a chunk of tokens.
_MEMORY_BUDGET = 256.0


@torch.no_grad()
def make_buckets(heads: Mapping[str, Head], labels: Tensor, k: int, temperature: float) -> Buckets:
    """The label and the k − 1 tokens to which any of the models, or the delta target at α = 1, gives most.

    Args:
        heads: role -> Head over the same N tokens.
        labels: [N] int64.
        k: tokens of the support; at most the vocabulary's are taken.
        temperature: τ of the log-probs.

    Returns:
        Buckets in at least float32, each support in falling order of the largest probability. The rest is summed over
        its own tokens, never as 1 − kept.
    """
    vocabulary = next(iter(heads.values())).weight.shape[0]
    heads = {role: head.upcast() for role, head in heads.items()}
    size = chunk_size_for(_MEMORY_BUDGET, vocabulary, 4, "autograd")
    supports: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {role: [] for role in heads}
    for start in range(0, max(1, len(labels)), size):
        logits = {role: head.rows(start, start + size).logits() for role, head in heads.items()}
        chunk_labels = labels[start : start + size]
        for rows in row_blocks(next(iter(logits.values()))):
            log_probs = {role: (z_NV[rows] / temperature).log_softmax(-1) for role, z_NV in logits.items()}
            score_NV = functools.reduce(torch.maximum, [*log_probs.values(), *_delta(log_probs)])
            support_NK = score_NV.scatter(1, chunk_labels[rows, None], torch.inf).topk(min(k, vocabulary)).indices
            supports.append(support_NK)
            for role, log_p_NV in log_probs.items():
                kept_NK = log_p_NV.gather(1, support_NK)
                rest_N1 = log_p_NV.scatter_(1, support_NK, -torch.inf).logsumexp(-1, keepdim=True)
                parts[role].append(kept_NK if k >= vocabulary else torch.cat([kept_NK, rest_N1], dim=1))
    return Buckets(torch.cat(supports), {role: torch.cat(found) for role, found in parts.items()}, temperature)


def _delta(log_probs: Mapping[str, Tensor]) -> list[Tensor]:
    """The delta target at α = 1 (arXiv 2509.14526), [N, V] log-probs, where its three models are there."""
    if not log_probs.keys() >= {TEACHER, STUDENT_RAW, TEACHER_RAW}:
        return []
    composed_NV = log_probs[TEACHER] + (log_probs[STUDENT_RAW] - log_probs[TEACHER_RAW])
    # A token that the raw teacher rules out has no shift to speak of.
    return [composed_NV.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).log_softmax(-1)]


def topk_problems(loss: Loss) -> list[str]:
    """Why a loss can't be had from buckets, one sentence each.

    What weighs tokens by their probability can. What weighs all tokens of the vocabulary alike can't: nearly all of
    them are in the rest. Treatments are refused: a mask compares single tokens, and at τ ≠ 1 the log-probs at τ = 1 on
    which all of them act are not stored.
    """
    found = []
    for part in _parts_of(loss, set()):
        if isinstance(part, LogitMSE) or (isinstance(part, AlphaBeta) and part.alpha == part.beta == 0):
            found.append(f"{type(part).__name__} weighs all tokens of the vocabulary alike")
        if isinstance(part, LogitMatching) and part.weighting == "uniform":
            found.append("a logit matching with weighting=uniform weighs all tokens of the vocabulary alike")
        if isinstance(part, RatioMatching):
            found.append("a ratio of two models is compared on plausible tokens one by one")
        elif isinstance(part, Treatment) and not part.is_off:
            found.append("a treatment of a shift acts on single tokens at temperature 1")
        if isinstance(part, LogitMatching) and temperature_of(loss) != 1.0:
            found.append(
                f"a logit matching needs log-probs at temperature 1, and loss.temperature is {temperature_of(loss):g}"
            )
    if temperature_of(loss) != 1.0 and not isinstance(loss, LabelMixture):
        found.append("a loss of your own can be had at temperature 1 only")
    return [
        f"loss: {reason}, which log-probs of a few tokens can't give; reference.store=hidden is exact for every loss"
        for reason in dict.fromkeys(found)
    ]


def temperature_of(loss: Loss) -> float:
    """τ of a loss; 1 for one that has none."""
    return float(getattr(loss, "temperature", 1.0))


def _parts_of(thing: Any, seen: set[int]) -> Iterator[Any]:
    """A loss and the objects that it is made of, those left out that play no part."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    yield thing
    if (isinstance(thing, ShiftedTarget) and not thing.shifts) or isinstance(thing, RatioMatching):
        return
    if isinstance(thing, Mapping):
        inner = list(thing.values())
    elif isinstance(thing, list | tuple):
        inner = list(thing)
    else:
        inner = list(vars(thing).values()) if type(thing).__module__.startswith("deltakd.losses") else []
    for part in inner:
        yield from _parts_of(part, seen)


def sample_errors(
    loss: Loss, student: Head, heads: Mapping[str, Head], labels: Tensor, ks: Sequence[int], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """What a top-K store would get wrong on a sample, for several K.

    Args:
        loss: the loss.
        student, heads: of the student and the references over the same N tokens.
        labels: [N] int64.
        ks: the K's, rising.
        dtype: of the stored log-probs: its rounding is part of the errors.

    Returns:
        For each K: ``k``; ``kept_mass`` by role, the mean probability of the support at τ; ``loss_error``, relative,
        of the summed loss; ``gradient_error``, relative, in the 2-norm, the larger of those of the gradients to the
        student's hidden states and to its output embedding.
    """
    exact, exact_gradients = _loss_and_gradients(loss, student, labels, heads, None)
    buckets = make_buckets(heads, labels, max(ks), temperature_of(loss))
    report = []
    for k in ks:
        stored = buckets.first(k).cast(dtype)
        value, gradients = _loss_and_gradients(loss, student, labels, {}, stored)
        errors = [_relative(g, e) for g, e in zip(gradients, exact_gradients, strict=True)]
        kept = {role: in_float64(log_p[:, : stored.k]).exp().sum(-1).mean() for role, log_p in stored.log_probs.items()}
        report.append(
            {
                "k": stored.k,
                "kept_mass": {role: round(min(1.0, float(mass)), 6) for role, mass in kept.items()},
                "loss_error": float(f"{_relative(value, exact):.3g}"),
                "gradient_error": float(f"{max(errors):.3g}"),
            }
        )
    return report


def _loss_and_gradients(
    loss: Loss, student: Head, labels: Tensor, heads: Mapping[str, Head], buckets: Buckets | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    hidden, weight = (at_least_float32(t.detach()).requires_grad_() for t in (student.hidden, student.weight))
    leaf = replace(student, hidden=hidden, weight=weight, bias=None if student.bias is None else student.bias.detach())
    with torch.enable_grad():
        total, _ = chunked_loss(loss, {STUDENT: leaf, **heads}, labels, buckets=buckets)
        return total.detach(), torch.autograd.grad(total, [hidden, weight])


def _relative(value: Tensor, exact: Tensor) -> float:
    """‖value − exact‖ / ‖exact‖."""
    size = float(in_float64(exact).norm())
    return float(in_float64(value - exact).norm()) / size if size else float(bool(value.any()))
