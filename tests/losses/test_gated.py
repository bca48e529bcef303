"""The gated delta target: NumPy, its limits, models that rule tokens out, and what it says of itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deltakd.kernels import chunked_loss
from deltakd.losses import (
    Distillation,
    ForwardKL,
    ReverseKL,
    bilinear_target,
    delta_target,
    gated_delta_target,
    teacher_target,
)
from deltakd.references.topk import make_buckets, topk_problems
from deltakd.types import Head, Progress
from tests.losses.by_name import loss_named
from tests.losses.oracles import arrays, close, draw, forward_kl, gradient, log_softmax, numeric_gradient


def test_value_and_gradient_against_numpy() -> None:
    logits, labels = draw()
    z = {role: log_softmax(each) for role, each in arrays(logits).items()}
    gate = np.exp(-forward_kl(z["teacher"], z["teacher_raw"]) / 2.5)
    target = log_softmax((z["teacher"] + 0.7 * gate[:, None] * (z["student_raw"] - z["teacher_raw"])) / 1.3)
    loss = loss_named("delta_gated", delta_weight=0.7, target__gate_nats=2.5, temperature=1.3, ce_weight=0.0)
    output = loss(logits, labels)
    close(output.per_token, forward_kl(target, log_softmax(arrays(logits)["student"] / 1.3)))
    close(output.parts["delta_gate"], gate)
    numeric = numeric_gradient(lambda moved: forward_kl(target, log_softmax(moved / 1.3)), arrays(logits)["student"])
    close(gradient(loss, logits, labels), numeric, rtol=1e-6, atol=1e-8)


def test_limits() -> None:
    """c → ∞ is the delta target, c → 0 the teacher, and so is α = 0; with t = t0 the gate is 1."""
    logits, labels = draw()

    def value(target: object, given: dict[str, torch.Tensor] = logits) -> torch.Tensor:
        return Distillation(target, ForwardKL())(given, labels).per_token.detach()  # type: ignore[arg-type]

    delta, teacher = value(delta_target(0.7)), value(teacher_target())
    torch.testing.assert_close(value(gated_delta_target(0.7, math.inf)), delta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value(gated_delta_target(0.7, 1e12)), delta, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(value(gated_delta_target(0.7, 1e-12)), teacher, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value(gated_delta_target(0.0)), teacher, rtol=1e-12, atol=1e-12)
    same = logits | {"teacher_raw": logits["teacher"] + 3.0}
    torch.testing.assert_close(value(gated_delta_target(0.7), same), value(delta_target(0.7), same))
    assert Distillation(gated_delta_target(0.7), ForwardKL())(same, labels).parts["delta_gate"].eq(1.0).all()
    assert not torch.allclose(value(gated_delta_target(0.7)), delta)


def test_v_scales_the_teachers_shift_which_is_not_gated() -> None:
    """With an open gate it is the bilinear target, with a shut one the teacher's shift alone."""
    logits, labels = draw()

    def value(target: object) -> torch.Tensor:
        return Distillation(target, ForwardKL())(logits, labels).per_token.detach()  # type: ignore[arg-type]

    for v in (0.75, 1.5):
        torch.testing.assert_close(
            value(gated_delta_target(0.7, math.inf, v)), value(bilinear_target(0.7, v)), rtol=1e-11, atol=1e-11
        )
        torch.testing.assert_close(
            value(gated_delta_target(0.7, 1e-12, v)), value(bilinear_target(0.0, v)), rtol=1e-11, atol=1e-11
        )
    assert gated_delta_target(0.0, v=1.5).requires == {"teacher", "teacher_raw"}
    assert gated_delta_target(0.0, v=1.0).requires == {"teacher"}
    with pytest.raises(ValueError, match=r"loss.target.v is nan; it must be finite"):
        gated_delta_target(v=math.nan)


@pytest.mark.parametrize("role", ["teacher", "teacher_raw", "student_raw"])
def test_a_token_that_a_model_rules_out(role: str) -> None:
    """It has no target mass; where the raw teacher rules out what the teacher does not, the gate is shut."""
    logits, labels = draw()
    logits[role][:, 3] = -math.inf
    loss = loss_named("delta_gated", ce_weight=0.0)
    output = loss(logits, labels)
    assert torch.isfinite(output.per_token).all()
    assert torch.isfinite(gradient(loss, logits, labels)).all()
    assert torch.isneginf(loss.target(logits)[:, 3]).all()
    assert bool((output.parts["delta_gate"] == 0).all()) == (role == "teacher_raw")


@pytest.mark.parametrize("v", [1.0, 1.4])
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()], ids=lambda d: d.name)
def test_by_hand_and_from_a_top_k_store(divergence: ForwardKL | ReverseKL, v: float) -> None:
    """The kernel's sum, parts and gradients, and those of buckets over the whole vocabulary, are the formula's."""
    generator = torch.Generator().manual_seed(2)
    rand = {"generator": generator, "dtype": torch.float64}
    roles = ("student", "teacher", "teacher_raw", "student_raw")
    heads = {role: Head(torch.randn(9, 5, **rand), torch.randn(17, 5, **rand)) for role in roles}
    student = heads["student"]
    leaves = [student.hidden.requires_grad_(), student.weight.requires_grad_()]
    labels = torch.randint(0, 17, (9,), generator=generator)
    loss = Distillation(gated_delta_target(0.7, 0.8, v), divergence, ce_weight=0.3)
    output = loss({role: head.logits() for role, head in heads.items()}, labels)
    expected = torch.autograd.grad(output.per_token.sum(), leaves)
    references = {role: head for role, head in heads.items() if role != "student"}
    buckets = make_buckets(references, labels, 17, 1.0)
    for heads_given, buckets_given in ((heads, None), ({"student": student}, buckets)):
        total, parts = chunked_loss(loss, heads_given, labels, 4, buckets=buckets_given)
        torch.testing.assert_close(total, output.per_token.sum(), rtol=1e-10, atol=0)
        for ours, theirs in zip(torch.autograd.grad(total, leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(parts["delta_gate"], output.parts["delta_gate"].sum())


def test_what_it_says_of_itself() -> None:
    assert loss_named("delta_gated", delta_weight=0.0).requires == {"teacher"}
    assert loss_named("delta_gated").requires == {"teacher", "teacher_raw", "student_raw"}
    assert not topk_problems(loss_named("delta_gated"))
    assert "a gate needs log-probs at temperature 1" in topk_problems(loss_named("delta_gated", temperature=2.0))[0]
    moving = loss_named("delta_gated", delta_weight={"schedule": "linear", "from": 0.0, "to": 1.0, "steps": None})
    assert list(moving.schedules) == ["delta_weight"]
    for schedule in moving.schedules.values():
        schedule.on_step(Progress(4, 4), 1.0)
    logits, labels = draw()
    there = loss_named("delta_gated", delta_weight=1.0)
    torch.testing.assert_close(moving(logits, labels).per_token, there(logits, labels).per_token)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"loss\.target\.gate_nats is .*; it must be above 0"):
            gated_delta_target(1.0, wrong)
