"""Losses against NumPy float64 written from the formulas, and the identities of DESIGN 3.5."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltakd.losses import DeltaTarget, Distillation, ForwardKL, SupervisedFineTuning, TeacherTarget
from deltakd.types import Loss

ROLES = ("student", "teacher", "teacher_raw", "student_raw")


def kd(**options: float) -> Distillation:
    return Distillation(TeacherTarget(), ForwardKL(), **options)


def delta(alpha: float, **options: float) -> Distillation:
    return Distillation(DeltaTarget(alpha), ForwardKL(), **options)


def draw(seed: int = 0, n: int = 7, v: int = 23, scale: float = 3.0) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = {role: scale * torch.randn(n, v, generator=generator, dtype=torch.float64) for role in ROLES}
    logits["student"].requires_grad_()
    return logits, torch.randint(0, v, (n,), generator=generator)


def numpy_log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def numpy_delta_kd(
    logits: dict[str, Tensor], labels: Tensor, alpha: float, tau: float, lam: float, squared: bool
) -> np.ndarray:
    z = {role: value.detach().numpy() for role, value in logits.items()}
    target = numpy_log_softmax((z["teacher"] + alpha * (z["student_raw"] - z["teacher_raw"])) / tau)
    student = numpy_log_softmax(z["student"] / tau)
    kl = (np.exp(target) * (target - student)).sum(-1)
    ce = -numpy_log_softmax(z["student"])[np.arange(len(labels)), labels.numpy()]
    return lam * ce + (1 - lam) * (tau**2 if squared else 1) * kl


def gradient(loss: Loss, logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss(logits, labels).per_token.sum(), logits["student"])
    return grad


@pytest.mark.parametrize(
    ("alpha", "tau", "lam", "squared"),
    [(1, 1, 0.5, False), (0.3, 2.5, 0, True), (-0.7, 0.4, 0.2, False), (0, 1, 0.9, True)],
)
def test_values_agree_with_numpy(alpha: float, tau: float, lam: float, squared: bool) -> None:
    logits, labels = draw()
    loss = delta(alpha, temperature=tau, ce_weight=lam, temperature_squared=squared)
    expected = numpy_delta_kd(logits, labels, alpha, tau, lam, squared)
    np.testing.assert_allclose(loss(logits, labels).per_token.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_sft_is_cross_entropy() -> None:
    logits, labels = draw()
    expected = -numpy_log_softmax(logits["student"].detach().numpy())[np.arange(7), labels.numpy()]
    output = SupervisedFineTuning()(logits, labels)
    np.testing.assert_allclose(output.per_token.detach().numpy(), expected, rtol=1e-12)


def test_identity_1_alpha_zero_is_kd_bitwise_and_reads_no_raw_model() -> None:
    logits, labels = draw()
    assert delta(0).requires == kd().requires == {"teacher"}
    assert delta(1).requires == {"teacher", "teacher_raw", "student_raw"}
    assert torch.equal(delta(0)(logits, labels).per_token, kd()(logits, labels).per_token)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 1.0, 3.0])
def test_identity_2_equal_raw_models_give_kd(alpha: float) -> None:
    logits, labels = draw()
    logits["student_raw"] = logits["teacher_raw"] + torch.randn(7, 1, dtype=torch.float64)
    torch.testing.assert_close(delta(alpha)(logits, labels).per_token, kd()(logits, labels).per_token)


def test_identity_3_a_teacher_that_did_not_move_gives_the_raw_student() -> None:
    logits, labels = draw()
    logits["teacher"] = logits["teacher_raw"]
    to_raw_student = kd(ce_weight=0.0)(logits | {"teacher": logits["student_raw"]}, labels)
    torch.testing.assert_close(delta(1, ce_weight=0.0)(logits, labels).per_token, to_raw_student.per_token)


def test_identity_6_constants_per_position_change_nothing() -> None:
    logits, labels = draw()
    loss = delta(0.7, temperature=1.7)
    constants = torch.randn(4, 7, 1, dtype=torch.float64) * 50
    moved = {role: (z.detach() + c).requires_grad_() for (role, z), c in zip(logits.items(), constants, strict=True)}
    torch.testing.assert_close(loss(moved, labels).per_token, loss(logits, labels).per_token)
    torch.testing.assert_close(gradient(loss, moved, labels), gradient(loss, logits, labels))


def test_identities_8_and_9_zero_at_the_target_and_the_gradient() -> None:
    logits, labels = draw()
    tau, loss = 1.9, delta(0.6, temperature=1.9, ce_weight=0.0)
    target = logits["teacher"] + 0.6 * (logits["student_raw"] - logits["teacher_raw"])
    expected = ((logits["student"] / tau).softmax(-1) - (target / tau).softmax(-1)) / tau
    torch.testing.assert_close(gradient(loss, logits, labels), expected)
    there = logits | {"student": target.clone().requires_grad_()}
    assert loss(there, labels).per_token.abs().max() < 1e-12
    assert gradient(loss, there, labels).abs().max() < 1e-12


def test_identity_11_high_temperatures_give_half_the_variance() -> None:
    logits, labels = draw()
    loss = delta(1.0, temperature=1e4, ce_weight=0.0, temperature_squared=True)
    target = logits["teacher"] + logits["student_raw"] - logits["teacher_raw"]
    expected = 0.5 * (target - logits["student"]).var(-1, correction=0)
    torch.testing.assert_close(loss(logits, labels).per_token, expected, rtol=1e-3, atol=0)


def test_identity_12_lambda_one_is_sft_without_a_divergence() -> None:
    logits, labels = draw()
    loss = delta(1.0, ce_weight=1.0)
    assert loss.requires == frozenset()
    output = loss({"student": logits["student"]}, labels)
    assert torch.equal(output.per_token, SupervisedFineTuning()(logits, labels).per_token)
    assert set(output.parts) == {"ce"}


def test_identity_13_permuting_the_vocabulary_changes_nothing() -> None:
    logits, labels = draw()
    order = torch.randperm(23)
    moved = {role: z[:, order] for role, z in logits.items()}
    new_labels = torch.argsort(order)[labels]
    torch.testing.assert_close(delta(1)(moved, new_labels).per_token, delta(1)(logits, labels).per_token)


def test_identity_14_no_gradient_reaches_a_reference() -> None:
    logits, labels = draw()
    leaves = {role: z.detach().requires_grad_() for role, z in logits.items()}
    delta(1)(leaves, labels).per_token.sum().backward()
    assert leaves["student"].grad is not None
    assert all(leaves[role].grad is None for role in ROLES[1:])


def test_finite_differences() -> None:
    logits, labels = draw(n=2, v=5)
    loss = delta(0.8, temperature=1.3)
    references = {role: z for role, z in logits.items() if role != "student"}
    assert torch.autograd.gradcheck(lambda z: loss({"student": z, **references}, labels).per_token, logits["student"])


@settings(deadline=None, max_examples=40)
@given(
    v=st.integers(2, 2000),
    tau=st.floats(0.1, 100),
    scale=st.floats(0, 1e4),
    alpha=st.floats(-2, 2),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_finite_and_not_negative(v: int, tau: float, scale: float, alpha: float, dtype: torch.dtype, seed: int) -> None:
    logits, labels = draw(seed, 3, v, scale / 4)
    half = {role: z.detach().to(dtype).requires_grad_(role == "student") for role, z in logits.items()}
    output = delta(alpha, temperature=tau)(half, labels)
    assert output.per_token.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(output.per_token).all()
    assert output.parts["forward_kl"].min() >= -1e-5 * max(1.0, scale / tau)
    assert torch.isfinite(gradient(delta(alpha, temperature=tau), half, labels)).all()


def test_tokens_that_the_target_rules_out_cost_nothing() -> None:
    logits, labels = draw()
    logits["teacher"][:, 3] = -math.inf
    output = kd(ce_weight=0.0)(logits, labels)
    assert torch.isfinite(output.per_token).all()
    assert torch.isfinite(gradient(kd(ce_weight=0.0), logits, labels)).all()


def test_errors_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"loss.temperature is 0; .*; loss.ce_weight is 1.5; it must be between 0"):
        kd(temperature=0, ce_weight=1.5)
    logits, labels = draw()
    with pytest.raises(ValueError, match=r"the target reads .*'teacher_raw'"):
        delta(1)({"student": logits["student"], "teacher": logits["teacher"]}, labels)
