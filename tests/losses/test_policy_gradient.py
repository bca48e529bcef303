"""Losses of sampled tokens: identities (a) to (g) of docs/design.md by enumeration, NumPy oracles, clipping, values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deltakd.kernels import chunked_loss
from deltakd.losses import PolicyGradient, SequenceReverseKL, TowardsTarget, delta_target, teacher_target
from deltakd.types import Head, HeadLogits, Loss, TokenFacts
from tests.losses.by_name import SAMPLED, loss_named
from tests.losses.oracles import Array, arrays, close, draw, gradient, log_softmax, numeric_gradient, reverse_kl

#: Losses of single tokens; the others are in test_sequence_kl.
SINGLE = [name for name in SAMPLED if name != "minillm"]
ALPHAS = pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.3, 1.0, 1.7])


def expected_gradient(loss: Loss, logits: Mapping[str, Tensor]) -> Tensor:
    """Σ_v π_θ(v) · gradient for label v: the expectation over sampling, by enumeration; [N, V]."""
    q_NV = logits["student"].detach().softmax(-1)
    total_NV = torch.zeros_like(q_NV)
    for v in range(q_NV.shape[1]):
        labels = torch.full((len(q_NV),), v)
        total_NV += q_NV[:, v : v + 1] * gradient(loss, logits, labels)
    return total_NV


def advantages(loss: Loss, logits: Mapping[str, Tensor]) -> Tensor:
    """[N, V]: of every token, as if it had been sampled."""
    count, vocabulary = logits["student"].shape
    columns = [loss(logits, torch.full((count,), v)).parts["advantage"] for v in range(vocabulary)]
    return torch.stack(columns, dim=1)


def kl_gradient(target: Array, student: Array) -> Array:
    """∇ KL(π_θ ‖ target) by central differences, from target logits."""
    log_p = log_softmax(target)
    return numeric_gradient(lambda z: reverse_kl(log_p, log_softmax(z)), student)


def test_identity_a_the_expected_gradient_of_opd_is_that_of_reverse_kl() -> None:
    logits, _ = draw()
    z = arrays(logits)
    close(expected_gradient(loss_named("opd"), logits), kl_gradient(z["teacher"], z["student"]), rtol=1e-6, atol=1e-8)


@ALPHAS
def test_identity_a_of_delta_opd_with_the_delta_target(alpha: float) -> None:
    logits, _ = draw(1)
    z = arrays(logits)
    target = z["teacher"] + alpha * (z["student_raw"] - z["teacher_raw"])
    found = expected_gradient(loss_named("delta_opd", delta_weight=alpha), logits)
    close(found, kl_gradient(target, z["student"]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("weight", [0.2, 0.9])
def test_tokens_of_a_mixture_have_the_expected_gradient_of_the_students_own(name: str, weight: float) -> None:
    """Ratios π_θ / p̃, never clipped, make up for tokens drawn from p̃ = (1 − α) π_θ + α p_t."""
    logits, _ = draw(9)
    loss = loss_named(name, ratio_clip=None)
    q_NV, p_NV = (logits[role].detach().softmax(-1) for role in ("student", "teacher"))
    mixed_NV = (1 - weight) * q_NV + weight * p_NV
    found_NV = torch.zeros_like(q_NV)
    for v in range(q_NV.shape[1]):
        student = logits["student"].detach().requires_grad_()
        heads = {role: Head(z, torch.eye(z.shape[1], dtype=z.dtype)) for role, z in logits.items() if role != "student"}
        seen = HeadLogits(student, heads, TokenFacts(sampled_log_probs=mixed_NV[:, v].log()))
        per_token = loss(seen, torch.full((len(q_NV),), v)).per_token
        found_NV += mixed_NV[:, v : v + 1] * torch.autograd.grad(per_token.sum(), student)[0]
    torch.testing.assert_close(found_NV, expected_gradient(loss, logits), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reference", ["student_raw", "teacher_raw"])
def test_identity_b_exopd_at_scale_1_is_opd(reference: str) -> None:
    logits, labels = draw(2)
    ours, theirs = loss_named("exopd", scale=1.0, reference=reference), loss_named("opd")
    torch.testing.assert_close(gradient(ours, logits, labels), gradient(theirs, logits, labels))


@pytest.mark.parametrize("reference", ["student_raw", "teacher_raw"])
def test_identity_c_exopd_is_reverse_kl_to_the_extrapolated_teacher(reference: str) -> None:
    logits, _ = draw(3)
    z = arrays(logits)
    target = z[reference] + 1.25 * (z["teacher"] - z[reference])
    found = expected_gradient(loss_named("exopd", reference=reference), logits)
    close(found, kl_gradient(target, z["student"]), rtol=1e-6, atol=1e-8)


def test_identity_d_delta_opd_at_0_is_opd_and_loads_no_raw_model() -> None:
    logits, labels = draw(4)
    ours, theirs = loss_named("delta_opd", delta_weight=0.0), loss_named("opd")
    assert ours.requires == theirs.requires == {"teacher"}
    assert torch.equal(gradient(ours, logits, labels), gradient(theirs, logits, labels))


@ALPHAS
def test_identity_e_equal_raw_models_make_delta_opd_opd(alpha: float) -> None:
    logits, labels = draw(5)
    logits["student_raw"] = logits["teacher_raw"] + torch.arange(7.0, dtype=torch.float64)[:, None]
    ours, theirs = loss_named("delta_opd", delta_weight=alpha), loss_named("opd")
    torch.testing.assert_close(gradient(ours, logits, labels), gradient(theirs, logits, labels))


@pytest.mark.parametrize("name", ["opd", "delta_opd", "exopd"])
def test_identity_f_at_the_target_all_advantages_are_0(name: str) -> None:
    logits, _ = draw(6)
    loss = loss_named(name)
    assert isinstance(loss, PolicyGradient)
    assert isinstance(loss.score, TowardsTarget)
    logits["student"] = loss.score.target(logits).clone().requires_grad_()
    torch.testing.assert_close(advantages(loss, logits), torch.zeros(7, 23, dtype=torch.float64), rtol=0, atol=1e-12)


def test_identity_g_opd2_has_the_sign_of_opd_or_is_0() -> None:
    logits, _ = draw(7)
    ours, theirs = advantages(loss_named("opd2"), logits), advantages(loss_named("opd"), logits)
    assert ((ours == 0) | (ours.sign() == theirs.sign())).all()
    assert 0.2 < (ours == 0).double().mean() < 0.8


def mean_under(z: Array, values: Array) -> Array:
    return (np.exp(log_softmax(z)) * values).sum(-1, keepdims=True)


@pytest.mark.parametrize("name", SINGLE)
def test_advantages_against_numpy(name: str) -> None:
    logits, _ = draw(8)
    z = {role: log_softmax(values) for role, values in arrays(logits).items()}
    opd = z["teacher"] - z["student"]
    shift = z["teacher"] - z["teacher_raw"]
    score = {
        "opd": opd,
        "exopd": 1.25 * (z["teacher"] - z["student_raw"]) - (z["student"] - z["student_raw"]),
        "delta_opd": z["teacher"] + z["student_raw"] - z["teacher_raw"] - z["student"],
        "opd2": shift,
    }[name]
    expected = score - mean_under(z["student"], score)
    if name == "opd2":
        expected = np.where(expected * (opd - mean_under(z["student"], opd)) > 0, expected, 0.0)
    close(advantages(loss_named(name), logits), expected)


@pytest.mark.parametrize("name", SINGLE)
def test_the_gradient_is_minus_the_advantage_times_that_of_the_log_prob(name: str) -> None:
    logits, labels = draw(9)
    loss = loss_named(name)
    advantage_N = loss(logits, labels).parts["advantage"].numpy()
    q_NV = np.exp(log_softmax(arrays(logits)["student"]))
    one_hot = np.eye(q_NV.shape[1])[labels.numpy()]
    close(gradient(loss, logits, labels), -advantage_N[:, None] * (one_hot - q_NV))


@pytest.mark.parametrize("name", ["opd", "delta_opd", "exopd"])
def test_the_value_is_the_reverse_kl_not_the_surrogate(name: str) -> None:
    logits, labels = draw(10)
    loss = loss_named(name)
    assert isinstance(loss, PolicyGradient)
    assert isinstance(loss.score, TowardsTarget)
    expected = reverse_kl(log_softmax(loss.score.target(logits).numpy()), log_softmax(arrays(logits)["student"]))
    output = loss(logits, labels)
    close(output.per_token, expected)
    close(output.parts["reverse_kl"], expected)


def test_cross_entropy_mixes_in_and_at_1_nothing_is_read() -> None:
    logits, labels = draw(11)
    mixed, plain, sft = loss_named("opd", ce_weight=0.3), loss_named("opd"), loss_named("sft")
    expected = 0.3 * gradient(sft, logits, labels) + 0.7 * gradient(plain, logits, labels)
    torch.testing.assert_close(gradient(mixed, logits, labels), expected)
    only = loss_named("opd", ce_weight=1.0)
    assert only.requires == frozenset()
    torch.testing.assert_close(gradient(only, logits, labels), gradient(sft, logits, labels))


def with_sampled(logits: Mapping[str, Tensor], sampled_log_probs_N: Tensor) -> HeadLogits:
    """Logits as a mapping that also knows how the labels were sampled."""
    vocabulary = logits["student"].shape[1]
    eye = torch.eye(vocabulary, dtype=torch.float64)
    heads = {role: Head(z, eye) for role, z in logits.items() if role != "student"}
    return HeadLogits(logits["student"], heads, TokenFacts(sampled_log_probs=sampled_log_probs_N))


def label_log_probs(logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    return logits["student"].detach().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def test_labels_sampled_by_the_student_as_it_is_have_a_ratio_of_1() -> None:
    logits, labels = draw(12)
    loss = loss_named("opd")
    sampled = with_sampled(logits, label_log_probs(logits, labels))
    torch.testing.assert_close(gradient(loss, sampled, labels), gradient(loss, logits, labels))


def test_ratios_outside_the_clip_gain_nothing_more() -> None:
    """PPO: no gradient where A > 0 and the ratio is above 1 + ε, or A < 0 and it is below 1 − ε; else A·ratio·∇log."""
    logits, labels = draw(13, n=200)
    loss = loss_named("opd")
    moved_N = torch.empty(200, dtype=torch.float64).uniform_(-0.6, 0.6, generator=torch.Generator().manual_seed(0))
    sampled = with_sampled(logits, label_log_probs(logits, labels) - moved_N)
    advantage_N = loss(logits, labels).parts["advantage"]
    ratio_N = moved_N.exp()
    cut_N = torch.where(advantage_N > 0, ratio_N > 1.2, ratio_N < 0.8)
    assert 20 < cut_N.sum() < 180
    expected = gradient(loss, logits, labels) * (ratio_N * ~cut_N)[:, None]
    torch.testing.assert_close(gradient(loss, sampled, labels), expected)


def test_an_advantage_is_bounded_on_request() -> None:
    logits, _ = draw(14)
    free, bounded = advantages(loss_named("opd"), logits), advantages(loss_named("opd", advantage_clip=0.5), logits)
    assert free.abs().max() > 0.5
    torch.testing.assert_close(bounded, free.clamp(-0.5, 0.5))


def test_a_token_that_both_rule_out_leaves_everything_finite() -> None:
    logits, labels = draw(15)
    ruled_out = torch.arange(23) == (int(labels[0]) + 1) % 23
    both = {role: z.detach().masked_fill(ruled_out, -torch.inf) for role, z in logits.items()}
    both["student"].requires_grad_()
    usable = labels != int(ruled_out.nonzero())
    for name in SINGLE:
        loss = loss_named(name)
        kept = {role: z.detach()[usable] for role, z in both.items()}
        kept["student"].requires_grad_()
        output = loss(kept, labels[usable])
        assert output.per_token.isfinite().all(), name
        assert gradient(loss, kept, labels[usable]).isfinite().all(), name


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("sampled_before", [False, True])
def test_in_chunks_as_at_once(name: str, sampled_before: bool) -> None:
    generator = torch.Generator().manual_seed(16)
    roles = ("student", "teacher", "teacher_raw", "student_raw")
    heads = {
        role: Head(
            torch.randn(11, 5, generator=generator, dtype=torch.float64).requires_grad_(role == "student"),
            torch.randn(19, 5, generator=generator, dtype=torch.float64).requires_grad_(role == "student"),
        )
        for role in roles
    }
    labels = torch.randint(0, 19, (11,), generator=generator)
    before_N = torch.randn(11, generator=generator, dtype=torch.float64) - 3 if sampled_before else None
    loss = loss_named(name, delta_weight=0.7)
    student = heads["student"]
    facts = TokenFacts(sampled_log_probs=before_N)
    plain = loss(HeadLogits(student.logits(), {r: h for r, h in heads.items() if r != "student"}, facts), labels)
    expected = torch.autograd.grad(plain.per_token.sum(), [student.hidden, student.weight])
    total, parts = chunked_loss(loss, heads, labels, chunk_size=4, facts=facts)
    found = torch.autograd.grad(total, [student.hidden, student.weight])
    torch.testing.assert_close(total, plain.per_token.sum())
    torch.testing.assert_close(found, expected)
    for part, value in parts.items():
        torch.testing.assert_close(value, plain.parts[part].sum().detach())


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("exopd", {"reference": "teacher"}, "loss.reference is 'teacher'; allowed: student_raw, teacher_raw"),
        ("exopd", {"scale": float("inf")}, "loss.scale"),
        ("opd", {"ratio_clip": 1.0}, "loss.ratio_clip is 1.0"),
        ("opd", {"advantage_clip": 0.0}, "loss.advantage_clip is 0.0"),
        ("opd2", {"ce_weight": 2.0}, "loss.ce_weight is 2.0"),
    ],
)
def test_wrong_settings_are_named(name: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(Exception, match=named.replace(".", r"\.")):
        loss_named(name, **options)


def test_a_score_has_to_be_one() -> None:
    with pytest.raises(ValueError, match=r"loss\.score is an object of"):
        PolicyGradient(teacher_target())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SAMPLED)
def test_entropy_and_the_distance_from_the_teacher_against_numpy(name: str) -> None:
    logits, labels = draw(12)
    parts = loss_named(name)(logits, labels).parts
    z = arrays(logits)
    log_q, log_p = log_softmax(z["student"]), log_softmax(z["teacher"])
    close(parts["entropy"], -(np.exp(log_q) * log_q).sum(-1))
    # Where the teacher is the target, its KL is the loss's value already.
    assert ("teacher_kl" in parts) == (name in ("delta_opd", "exopd", "opd2"))
    close(parts.get("teacher_kl", parts.get("reverse_kl")), reverse_kl(log_p, log_q))


def test_entropy_of_a_student_that_rules_tokens_out_is_finite() -> None:
    logits, labels = draw(13)
    student = logits["student"].detach().clone()
    student[:, -1] = -torch.inf
    labels = labels.clamp(max=student.shape[1] - 2)
    entropy = loss_named("opd")({**logits, "student": student.requires_grad_()}, labels).parts["entropy"]
    assert entropy.isfinite().all()


@pytest.mark.parametrize(
    "loss",
    [*(loss_named(name) for name in ("delta_opd", "exopd", "opd2")), SequenceReverseKL(delta_target())],
    ids=["delta_opd", "exopd", "opd2", "of whole responses"],
)
def test_what_is_watched_multiplies_no_head_again(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[int] = []
    for name in ("logits", "add_logits"):
        plain = getattr(Head, name)
        monkeypatch.setattr(
            Head, name, lambda head, *args, plain=plain: multiplied.append(id(head)) or plain(head, *args)
        )
    heads = {role: Head(torch.randn(3, 2), torch.randn(5, 2)) for role in sorted(loss.requires)}
    output = loss(HeadLogits(torch.randn(3, 5), heads), torch.tensor([0, 4, 2]))
    assert "teacher_kl" in output.parts
    assert sorted(multiplied) == sorted(map(id, heads.values()))
