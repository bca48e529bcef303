"""The reduced vocabulary: the plain losses where it is whole, NumPy oracles where it is not."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deltakd.kernels import Buckets, chunked_loss
from deltakd.references.topk import make_buckets, sample_errors, topk_problems
from deltakd.types import Head, Loss
from tests.losses.by_name import DISTILLING, loss_named

N, V = 11, 29
ALIKE = ("kd_logit_mse", "parallel_ratio", "parallel_cross")
AT_ONE = ("delta_gated", "parallel_logit", "kd_plus_delta")
WIDTHS = {"student": 6, "teacher": 9, "teacher_raw": 9, "student_raw": 6, "teacher_2": 5, "teacher_raw_2": 5}


@functools.cache
def make_heads(softcap: float | None = None, dtype: torch.dtype = torch.float64) -> Mapping[str, Head]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {role: Head(draw(N, width), draw(V, width), draw(V), softcap, 0.7) for role, width in WIDTHS.items()}


def labels() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


def references(heads: Mapping[str, Head], loss: Loss | None = None) -> dict[str, Head]:
    wanted = ("teacher", "teacher_raw", "student_raw") if loss is None else loss.requires
    return {role: heads[role] for role in wanted}


def value_and_gradients(
    loss: Loss, heads: Mapping[str, Head], buckets: Buckets | None = None, chunk_size: int = 4
) -> list[Tensor]:
    student = heads["student"]
    leaves = [t.clone().requires_grad_() for t in (student.hidden, student.weight, student.bias) if t is not None]
    leaf = Head(leaves[0], leaves[1], leaves[2], student.softcap, student.scale)
    others = references(heads, loss) if buckets is None else {}
    total, parts = chunked_loss(loss, {"student": leaf, **others}, labels(), chunk_size, buckets=buckets)
    return [total.detach(), *torch.autograd.grad(total, leaves), *(parts[name] for name in sorted(parts))]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("name", [name for name in DISTILLING if name not in ALIKE])
def test_the_whole_vocabulary_as_support_is_the_plain_loss(name: str, temperature: float) -> None:
    if temperature != 1.0 and name in AT_ONE:
        return
    loss, heads = loss_named(name, delta_weight=0.7, temperature=temperature, ce_weight=0.3), make_heads()
    buckets = make_buckets(references(heads, loss), labels(), V, temperature)
    assert not buckets.has_tail
    torch.testing.assert_close(
        value_and_gradients(loss, heads, buckets), value_and_gradients(loss, heads), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_few_tokens_against_numpy(temperature: float, softcap: float | None) -> None:
    """Delta-KD by hand over K tokens and the rest; the cross-entropy is that of the whole vocabulary."""
    k, alpha, ce_weight = 5, 0.7, 0.3
    heads = make_heads(softcap)
    loss = loss_named("delta_kd", delta_weight=alpha, temperature=temperature, ce_weight=ce_weight)
    buckets = make_buckets(references(heads), labels(), k, temperature)
    z = {role: heads[role].logits().numpy() for role in ("student", *references(heads))}
    log_p = {role: log_softmax(values / temperature) for role, values in z.items()}
    total, gradient_z = 0.0, np.zeros((N, V))
    for n, label in enumerate(labels().tolist()):
        support = expected_support({role: log_p[role][n] for role in references(heads)}, label, k)
        assert set(buckets.support[n].tolist()) == set(support)
        assert buckets.support[n, 0] == label
        rest = [v for v in range(V) if v not in support]
        coarse = {
            role: np.append(values[n][support], np.log(np.exp(values[n][rest]).sum())) for role, values in log_p.items()
        }
        target = log_softmax(coarse["teacher"] + alpha * (coarse["student_raw"] - coarse["teacher_raw"]))
        p, q = np.exp(target), np.exp(coarse["student"])
        ce = -log_softmax(z["student"][n])[label]
        total += ce_weight * ce + (1 - ce_weight) * (p * (target - coarse["student"])).sum()
        each = np.exp(log_p["student"][n])
        slope = each.copy()
        slope[support] -= p[:k]
        slope[rest] -= p[k] * each[rest] / q[k]
        own = np.exp(log_softmax(z["student"][n]))
        own[label] -= 1
        gradient_z[n] = ce_weight * own + (1 - ce_weight) * slope / temperature
    value, grad_hidden, grad_weight, grad_bias, ce_sum, _ = value_and_gradients(loss, heads, buckets)
    assert math.isclose(float(value), total, rel_tol=1e-10)
    exact_ce = cross_entropy(torch.from_numpy(z["student"]), labels(), reduction="sum")
    assert math.isclose(float(ce_sum), float(exact_ce), rel_tol=1e-12)
    student = heads["student"]
    if softcap is not None:
        gradient_z *= 1 - (z["student"] / softcap) ** 2
    gradient_z *= student.scale
    np.testing.assert_allclose(grad_hidden, gradient_z @ student.weight.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grad_weight, gradient_z.T @ student.hidden.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grad_bias, gradient_z.sum(0), rtol=1e-9, atol=1e-12)


def expected_support(log_p: Mapping[str, Any], label: int, k: int) -> list[int]:
    composed = log_softmax(log_p["teacher"] + log_p["student_raw"] - log_p["teacher_raw"])
    score = np.max([*log_p.values(), composed], axis=0)
    score[label] = np.inf
    return [int(v) for v in np.argsort(-score)[:k]]


def log_softmax(z: Any) -> Any:
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_fewer_tokens_of_a_support_are_those_of_a_smaller_one() -> None:
    given = references(make_heads())
    cut, small = make_buckets(given, labels(), 12, 1.3).first(4), make_buckets(given, labels(), 4, 1.3)
    assert torch.equal(cut.support, small.support)
    torch.testing.assert_close(dict(cut.log_probs), dict(small.log_probs), rtol=1e-12, atol=0)
    assert cut.first(9) is cut


def test_a_rest_of_almost_nothing_is_summed_and_not_subtracted() -> None:
    """In float32 1 − kept is 0 here; on both sides the rest still has its probability, and a finite gradient."""
    hidden = torch.eye(3)
    weight = torch.tensor([[40.0, 30.0, 20.0], [0.0, 1.0, 2.0], [-1.0, -9.0, 4.0], [1.0, 3.0, -5.0]])
    head = Head(hidden, weight)
    target = torch.tensor([0, 0, 0])
    buckets = make_buckets({"teacher": head}, target, 2, 1.0)
    z = weight.double().T.numpy()
    for n in range(3):
        rest = [v for v in range(4) if v not in buckets.support[n].tolist()]
        expected = np.log(np.exp(log_softmax(z[n])[rest]).sum())
        assert float(buckets.log_probs["teacher"][n, -1]) == pytest.approx(expected, rel=1e-6)
    leaf = Head(hidden.clone().requires_grad_(), weight)
    total, _ = chunked_loss(loss_named("kd_reverse", ce_weight=0.0), {"student": leaf}, target, buckets=buckets)
    assert float(total.detach()) == pytest.approx(0.0, abs=1e-6)
    assert torch.autograd.grad(total, leaf.hidden)[0].isfinite().all()


def test_losses_that_buckets_cannot_give_are_refused_by_their_reason() -> None:
    refused = {name for name in DISTILLING if topk_problems(loss_named(name))}
    assert refused == set(ALIKE)
    assert {n for n in DISTILLING if topk_problems(loss_named(n, temperature=2.0))} == {*ALIKE, *AT_ONE}
    cases = {
        "weighs all tokens": loss_named("kd_alpha_beta", divergence__alpha=0.0, divergence__beta=0.0),
        "weighting=uniform": loss_named("parallel_logit", matching__weighting="uniform"),
        "a treatment of a shift": loss_named("delta_kd", target__treatment__clip=2.0),
        "plausible tokens one by one": loss_named("kd_plus_delta", matching="ratio"),
        "loss.temperature is 2": loss_named("parallel_logit", temperature=2.0),
        "loss of your own": Own(),
    }
    for reason, loss in cases.items():
        (problem,) = topk_problems(loss)
        assert reason in problem
        assert "reference.store=hidden is exact" in problem
    # At α = 0 there is no shift to treat.
    assert not topk_problems(loss_named("delta_kd", delta_weight=0.0, target__treatment__clip=2.0))


class Own(Loss):
    requires = frozenset({"teacher"})
    temperature = 2.0

    def __call__(self, logits: Mapping[str, Tensor], labels: Tensor) -> Any:
        raise NotImplementedError


def test_errors_of_a_sample() -> None:
    """Against the values themselves; they fall with K, and end at the rounding of what is stored."""
    heads, loss = make_heads(), loss_named("delta_kd", delta_weight=0.6)
    given = references(heads)
    report = sample_errors(loss, heads["student"], given, labels(), [2, 8, V], torch.float64)
    assert [entry["k"] for entry in report] == [2, 8, V]
    term = loss_named("delta_kd", delta_weight=0.6, ce_weight=0.0)
    exact, *gradients = value_and_gradients(term, heads)
    for entry in report:
        buckets = make_buckets(given, labels(), entry["k"], 1.0)
        value, hidden, weight, *_ = value_and_gradients(term, heads, buckets)
        assert entry["loss_error"] == pytest.approx(float((value - exact).abs() / exact), rel=0.01, abs=1e-12)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip((hidden, weight), gradients, strict=False)]
        assert entry["gradient_error"] == pytest.approx(max(errors), rel=0.01, abs=1e-12)
        probabilities = given["teacher"].logits().softmax(-1)
        kept = probabilities.gather(1, buckets.support).sum(1).mean()
        assert entry["kept_mass"]["teacher"] == pytest.approx(float(kept), abs=1e-6)
    errors_by_k = [entry["gradient_error"] for entry in report]
    assert errors_by_k[0] > errors_by_k[1] > errors_by_k[2]
    assert errors_by_k[2] < 1e-12
    rounded = sample_errors(loss, heads["student"], given, labels(), [V], torch.float16)[0]
    assert 1e-6 < rounded["gradient_error"] < 1e-2


def test_labels_hide_no_error_of_the_term() -> None:
    """The cross-entropy is exact with any K: a mixture of 0.95 of it is judged as the term by itself."""
    heads = make_heads()
    given = references(heads)
    mixed, alone = (
        sample_errors(loss_named("kd_jsd", ce_weight=weight), heads["student"], given, labels(), [2, 8], torch.float64)
        for weight in (0.95, 0.0)
    )
    assert mixed == alone
    assert alone[0]["loss_error"] > 0.05


def test_what_does_not_fit_is_an_error() -> None:
    heads, loss = make_heads(), loss_named("delta_kd")
    buckets = make_buckets({"teacher": heads["teacher"]}, labels(), 4, 1.0)
    with pytest.raises(ValueError, match=r"buckets of 11 tokens for \['student_raw', 'teacher', 'teacher_raw'\]"):
        chunked_loss(loss, {"student": heads["student"]}, labels(), buckets=buckets)
    with pytest.raises(ValueError, match="there are 3 for"):
        chunked_loss(loss_named("kd"), {"student": heads["student"]}, labels(), buckets=buckets.rows(0, 3))


def test_without_gradients_the_value_is_the_same() -> None:
    heads, loss = make_heads(), loss_named("delta_kd", temperature=1.7)
    buckets = make_buckets(references(heads), labels(), 6, 1.7)
    with torch.no_grad():
        total, _ = chunked_loss(loss, {"student": heads["student"]}, labels(), 5, buckets=buckets)
    torch.testing.assert_close(total, value_and_gradients(loss, heads, buckets)[0], rtol=1e-12, atol=0)
