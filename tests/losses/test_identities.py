"""The identities of docs/design.md#identities on random float64 logits; the name of each test has its number.

16, and those on whole training runs and real models, are in tests/runs; 8 is also in test_divergences.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from deltakd.kernels import chunked_loss
from deltakd.losses import (
    DeltaMatching,
    Distillation,
    ForwardKL,
    JensenShannon,
    LogitMatching,
    ReverseKL,
    ShiftedTarget,
    SignedParallelogram,
    SupervisedFineTuning,
    Target,
    Treatment,
    bilinear_target,
    delta_target,
    shift_target,
    teacher_target,
)
from deltakd.types import Head, Loss
from tests.losses import oracles
from tests.losses.by_name import DISTILLING, NAMES, loss_named, variants
from tests.losses.oracles import ROLES, arrays, close, draw, gradient, log_softmax

BY_NAME = pytest.mark.parametrize("name", NAMES)
ALPHAS = pytest.mark.parametrize("alpha", [-1.5, 0.3, 1.0, 2.0])
TREATED = Treatment(centre="teacher", clip=1.5, mask=0.05)
TREATMENTS = pytest.mark.parametrize("treatment", [Treatment(), TREATED], ids=["untreated", "treated"])


def distribution(target: Target, logits: dict[str, Tensor], tau: float = 1.0) -> Tensor:
    return (target(logits) / tau).log_softmax(-1)


def same(first: Loss, second: Loss, logits: dict[str, Tensor], labels: Tensor) -> None:
    torch.testing.assert_close(first(logits, labels).per_token, second(logits, labels).per_token, rtol=1e-9, atol=1e-11)
    ours, theirs = gradient(first, logits, labels), gradient(second, logits, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tau", [1.0, 1.7])
def test_identity_1_delta_at_0_is_kd_bit_for_bit(tau: float) -> None:
    """And no raw model is read; nor in the chunked sum."""
    logits, labels = draw()
    loss, kd = (loss_named(n, delta_weight=0, temperature=tau) for n in ("delta_kd", "kd"))
    assert loss.requires == kd.requires == {"teacher"}
    only = {role: logits[role] for role in ("student", "teacher")}
    assert torch.equal(loss(only, labels).per_token, kd(only, labels).per_token)
    assert torch.equal(gradient(loss, only, labels), gradient(kd, only, labels))
    heads = {role: Head(z.detach(), torch.eye(23, dtype=z.dtype).requires_grad_()) for role, z in only.items()}
    ours, theirs = (chunked_loss(each, heads, labels, 3)[0] for each in (loss, kd))
    assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(total, heads["student"].weight)[0] for total in (ours, theirs)]
    assert torch.equal(*grads)


@TREATMENTS
@ALPHAS
def test_identity_2_equal_raw_models_give_kd(alpha: float, treatment: Treatment) -> None:
    """Equal up to a constant per position."""
    logits, labels = draw()
    logits["student_raw"] = logits["teacher_raw"] + 9 * torch.randn(7, 1, dtype=torch.float64)
    same(
        Distillation(delta_target(alpha, treatment), ForwardKL(), 1.7),
        Distillation(teacher_target(), ForwardKL(), 1.7),
        logits,
        labels,
    )


def test_identity_3_a_teacher_that_did_not_move_gives_the_raw_student() -> None:
    logits, labels = draw()
    logits["teacher"] = logits["teacher_raw"] + 9 * torch.randn(7, 1, dtype=torch.float64)
    raw_student = Distillation(ShiftedTarget("student_raw"), ForwardKL(), 1.7)
    for target in (delta_target(1.0), *(shift_target(b) for b in (-1.5, 0.3, 1.0, 2.0)), shift_target(0.3, TREATED)):
        same(Distillation(target, ForwardKL(), 1.7), raw_student, logits, labels)


def test_identity_4_delta_and_shift_are_one_at_1_only() -> None:
    logits, _ = draw()
    torch.testing.assert_close(distribution(delta_target(1.0), logits), distribution(shift_target(1.0), logits))
    apart = distribution(delta_target(0.5), logits) - distribution(shift_target(0.5), logits)
    assert apart.abs().max() > 0.5


@ALPHAS
def test_identity_5_bilinear_holds_delta_and_shift(alpha: float) -> None:
    logits, _ = draw()
    for bilinear, other in (
        (bilinear_target(alpha, 1.0), delta_target(alpha)),
        (bilinear_target(1.0, alpha), shift_target(alpha)),
    ):
        torch.testing.assert_close(distribution(bilinear, logits, 1.7), distribution(other, logits, 1.7))


@BY_NAME
def test_identity_6_constants_per_position_change_nothing(name: str) -> None:
    logits, labels = draw()
    generator = torch.Generator().manual_seed(1)
    moved = {
        role: (z.detach() + 50 * torch.randn(7, 1, generator=generator, dtype=z.dtype)).requires_grad_()
        for role, z in logits.items()
    }
    for loss in variants(name):
        first, second = loss(logits, labels), loss(moved, labels)
        torch.testing.assert_close(second.per_token, first.per_token, rtol=1e-9, atol=1e-11)
        for part, value_N in first.parts.items():
            torch.testing.assert_close(second.parts[part], value_N, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gradient(loss, moved, labels), gradient(loss, logits, labels), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("beta", [0.4, 1.0, -0.7])
def test_identity_7_shifts_of_equal_beta_compose(beta: float) -> None:
    """(t0 → t1), and then (t1 → t2) on top of it, is (t0 → t2)."""
    logits, _ = draw()
    t0, t1, t2, raw_student = (logits[role] for role in ("teacher_raw", "teacher", "teacher_2", "student_raw"))

    def shifted(base: Tensor, origin: Tensor, to: Tensor) -> Tensor:
        return shift_target(beta)({"student_raw": base, "teacher_raw": origin, "teacher": to})

    twice = shifted(shifted(raw_student, t0, t1), t1, t2)
    torch.testing.assert_close(twice.log_softmax(-1), shifted(raw_student, t0, t2).log_softmax(-1))


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.9])
@pytest.mark.parametrize("name", sorted(set(DISTILLING) - {"parallelogram", "signed_parallelogram", "kd_plus_delta"}))
def test_identity_8_zero_at_the_target(name: str, tau: float) -> None:
    """In value and, TVD's kink apart, in gradient, without the labels. The mixed losses are outside this."""
    loss = loss_named(name, delta_weight=0.7, temperature=tau, ce_weight=0.0)
    logits, labels = draw()
    if name == "taid":
        met = logits["teacher"]
    elif name == "parallel_cross":
        met = logits["teacher"] + logits["student_raw"] - logits["teacher_raw"]
    elif name.startswith("parallel_"):
        beta = 0.7 if name == "parallel_logit" else 1.0
        met = logits["student_raw"] + beta * (logits["teacher"] - logits["teacher_raw"])
    else:
        met = loss.target(logits)
    there = logits | {"student": (met + 3.0).detach().requires_grad_()}
    assert loss(there, labels).per_token.abs().max() < 1e-12
    if name != "kd_tvd":
        assert gradient(loss, there, labels).abs().max() < 1e-12
    assert loss(logits, labels).per_token.max() > 0.1


@TREATMENTS
@pytest.mark.parametrize("tau", [0.5, 1.0, 1.9])
def test_identity_9_the_gradient_of_forward_kl(tau: float, treatment: Treatment) -> None:
    logits, labels = draw()
    target = delta_target(0.6, treatment)
    loss = Distillation(target, ForwardKL(), temperature=tau, ce_weight=0.0)
    z = arrays(logits)
    options = {"centre": treatment.centre, "clip": treatment.clip, "mask": treatment.mask}
    log_p = log_softmax(oracles.delta_target(z, 0.6, **options) / tau)
    close(gradient(loss, logits, labels), (np.exp(log_softmax(z["student"] / tau)) - np.exp(log_p)) / tau)


def test_identity_10_reverse_kl_to_the_shift_target() -> None:
    """KL(π_θ ‖ shift) = KL(π_θ ‖ raw student) − E_θ[log t − log t0] + log E_{raw student}[t / t0], all at τ = 1."""
    logits, labels = draw()
    output = Distillation(shift_target(1.0), ReverseKL(), ce_weight=0.0)(logits, labels)
    log = {role: log_softmax(z) for role, z in arrays(logits).items()}
    moved = log["teacher"] - log["teacher_raw"]
    log_z = np.log((np.exp(log["student_raw"]) * np.exp(log["teacher"]) / np.exp(log["teacher_raw"])).sum(-1))
    student = np.exp(log["student"])
    expected = (student * (log["student"] - log["student_raw"])).sum(-1) - (student * moved).sum(-1) + log_z
    close(output.per_token, expected)


@pytest.mark.parametrize("name", ["kd", "delta_kd", "kd_reverse"])
def test_identity_11_high_temperatures_give_half_the_variance(name: str) -> None:
    logits, labels = draw()
    z = arrays(logits)
    target = z["teacher"] + (0.7 * (z["student_raw"] - z["teacher_raw"]) if name == "delta_kd" else 0.0)
    errors = []
    for tau in (1e2, 1e3, 1e4):
        loss = loss_named(name, delta_weight=0.7, temperature=tau, ce_weight=0.0, temperature_squared=True)
        half = 0.5 * (target - z["student"]).var(-1)
        errors.append(np.abs(loss(logits, labels).per_token.detach().numpy() / half - 1).max())
    assert errors[2] < 1e-3
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("name", DISTILLING)
def test_identity_12_lambda_1_is_sft(name: str) -> None:
    """The term is not computed: no reference is read, and an infinite one gives no NaN (0 · ∞)."""
    logits, labels = draw()
    loss, sft = loss_named(name, ce_weight=1.0), SupervisedFineTuning()
    assert loss.requires == frozenset()
    broken = {role: torch.full_like(z, -math.inf) for role, z in logits.items()} | {"student": logits["student"]}
    for given in ({"student": logits["student"]}, broken):
        output = loss(given, labels)
        assert torch.equal(output.per_token, sft(given, labels).per_token)
        assert set(output.parts) == {"ce"}
        assert torch.equal(gradient(loss, given, labels), gradient(sft, given, labels))
    close(sft(logits, labels).per_token, oracles.cross_entropy(arrays(logits)["student"], labels.numpy()))


@pytest.mark.parametrize("name", DISTILLING)
def test_lambda_0_is_the_term_alone(name: str) -> None:
    """A label that the student rules out costs +∞, and 0 · ∞ must not be asked for."""
    logits, labels = draw()
    loss = loss_named(name, delta_weight=0.7, ce_weight=0.0)
    others = (labels + 1) % 23
    assert torch.equal(loss(logits, labels).per_token, loss(logits, others).per_token)
    assert torch.equal(gradient(loss, logits, labels), gradient(loss, logits, others))


@BY_NAME
def test_identity_13_permuting_the_vocabulary_changes_nothing(name: str) -> None:
    logits, labels = draw()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    moved = {role: z.detach()[:, order].requires_grad_() for role, z in logits.items()}
    new_labels = torch.argsort(order)[labels]
    for loss in variants(name):
        torch.testing.assert_close(loss(moved, new_labels).per_token, loss(logits, labels).per_token)
        torch.testing.assert_close(gradient(loss, moved, new_labels), gradient(loss, logits, labels)[:, order])


@BY_NAME
def test_identity_13_padded_vocabulary_rows_change_nothing(name: str) -> None:
    """Heads are cut to the vocabulary of the tokenizer: what is beyond it has no say and gets no gradient."""
    logits, labels = draw()
    generator = torch.Generator().manual_seed(3)

    def sum_and_gradient(beyond: float) -> tuple[Tensor, Tensor]:
        padding = beyond * torch.randn(9, 23, generator=generator, dtype=torch.float64)
        padded = torch.cat([torch.eye(23, dtype=torch.float64), padding]).requires_grad_()
        heads = {role: Head(logits[role].detach(), padded[:23]) for role in {"student", *loss.requires}}
        heads = {role: h if role == "student" else Head(h.hidden, h.weight.detach()) for role, h in heads.items()}
        total, _ = chunked_loss(loss, heads, labels, 3)
        return total.detach(), torch.autograd.grad(total, padded)[0]

    for loss in variants(name):
        plain, first = sum_and_gradient(0.0)
        torch.testing.assert_close(plain, loss(logits, labels).per_token.sum().detach())
        total, second = sum_and_gradient(100.0)
        assert torch.equal(total, plain)
        assert torch.equal(first, second)
        assert (second[23:] == 0).all()


@BY_NAME
def test_identity_14_no_gradient_reaches_a_reference(name: str) -> None:
    for loss in variants(name):
        logits, labels = draw()
        leaves = {role: z.detach().requires_grad_() for role, z in logits.items()}
        loss(leaves, labels).per_token.sum().backward()
        assert leaves["student"].grad is not None
        assert leaves["student"].grad.abs().max() > 0
        assert all(leaves[role].grad is None for role in ROLES[1:])


@BY_NAME
def test_identity_14_what_is_not_required_is_not_read(name: str) -> None:
    logits, labels = draw()
    for loss in variants(name):
        given = {role: z for role, z in logits.items() if role in {"student", *loss.requires}}
        torch.testing.assert_close(loss(given, labels).per_token, loss(logits, labels).per_token)
        for role in loss.requires:
            with pytest.raises((ValueError, KeyError), match=role):
                loss({r: z for r, z in given.items() if r != role}, labels)


@BY_NAME
def test_identity_15_no_valid_token_is_a_zero_on_the_graph(name: str) -> None:
    for loss in variants(name):
        logits, labels = draw()
        none = {role: z.detach()[:0].requires_grad_() for role, z in logits.items()}
        output = loss(none, labels[:0])
        assert output.per_token.shape == (0,)
        assert output.per_token.requires_grad
        assert torch.equal(gradient(loss, none, labels[:0]), torch.zeros(0, 23, dtype=torch.float64))
        hidden, weight = (torch.randn(n, dtype=torch.float64).requires_grad_() for n in ((0, 4), (23, 4)))
        heads = {role: Head(hidden, weight) for role in {"student", *loss.requires}}
        total, parts = chunked_loss(loss, heads, labels[:0])
        assert total.item() == 0
        assert parts == {}
        for grad, leaf in zip(torch.autograd.grad(total, [hidden, weight]), (hidden, weight), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


@BY_NAME
def test_a_token_does_not_depend_on_the_others(name: str) -> None:
    """What makes chunks, micro-batches and ranks add up (identity 16)."""
    logits, labels = draw()
    for loss in variants(name):
        whole = loss(logits, labels)
        one = loss({role: z[2:4] for role, z in logits.items()}, labels[2:4])
        torch.testing.assert_close(one.per_token, whole.per_token[2:4])
        assert all(value_N.shape == (7,) for value_N in whole.parts.values())


def test_the_parallelogram_closes() -> None:
    """At α = 1 in log space: raw student − raw teacher + teacher, which delta, shift, and bilinear(1, 1) all are."""
    logits, labels = draw()
    corners = {"delta": 1.0, "shift": 1.0}
    loss = loss_named("parallelogram", weights={"teacher": 0.0, "student_raw": 0.0, **corners}, ce_weight=0.0)
    same(loss, Distillation(bilinear_target(1.0, 1.0), ForwardKL(), ce_weight=0.0), logits, labels)


def test_a_signed_parallelogram_of_one_shiftless_pair_is_kd() -> None:
    """Raw student = raw teacher: the two cancel, safe or not."""
    logits, labels = draw()
    logits["student_raw"] = logits["teacher_raw"] - 5.0
    for unsafe in (False, True):
        same(
            SignedParallelogram(1.3, unsafe, temperature=1.7),
            Distillation(teacher_target(), ForwardKL(), 1.7),
            logits,
            labels,
        )


def test_uniform_logit_matching_is_the_mse_to_the_shift_target() -> None:
    """Two families, one number: the population variance of z_target − z_s."""
    logits, labels = draw()
    matching = DeltaMatching(LogitMatching("uniform", 0.7), temperature=1.7)
    mse = loss_named("kd_logit_mse", temperature=1.7)
    there = logits | {"teacher": shift_target(0.7)(logits)}
    torch.testing.assert_close(matching(logits, labels).per_token, mse(there, labels).per_token)
    assert JensenShannon().name in loss_named("kd_jsd")(logits, labels).parts
