"""Measures of shifts against an independent NumPy computation, and identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from deltakd.evaluation.token_measures import TokenMeasures, token_measures, top_candidates
from deltakd.types import ROLES, Head

N, V = 11, 17


def identity_head(logits_NV: Tensor, bias: Tensor | None = None) -> Head:
    """A head whose logits are given."""
    return Head(logits_NV, torch.eye(logits_NV.shape[1], dtype=logits_NV.dtype), bias)


@pytest.fixture
def logits() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {role: 3 * torch.randn(N, V, generator=draw) for role in ROLES}


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))


def shifts(heads: dict[str, Head], labels: Tensor, chunk_size: int = 64) -> TokenMeasures:
    return token_measures(heads, labels, chunk_size, with_shifts=True)


def oracle(logits: dict[str, Tensor], labels: Tensor) -> dict[str, np.ndarray]:
    """By loops in float64, and the correlation as E[xy] − E[x]E[y] over a table of pairs."""
    found: dict[str, list[float]] = {name: [] for name in ("correlation", "kl_teacher", "kl_raw", "top1_agreement")}
    found |= {"nll": [], "student_shift": [], "teacher_shift": []}
    for n in range(len(labels)):
        p = {role: np.exp(z[n].double().numpy()) for role, z in logits.items()}
        p = {role: values / values.sum() for role, values in p.items()}
        weight = p["teacher"]
        kept = [v for v in range(V) if all(values[v] > 0 for values in p.values())]
        x = [math.log(p["student"][v] / p["student_raw"][v]) for v in kept]
        y = [math.log(p["teacher"][v] / p["teacher_raw"][v]) for v in kept]
        w = weight[kept] / weight[kept].sum()
        ex, ey = np.dot(w, x), np.dot(w, y)
        cov = np.dot(w, np.multiply(x, y)) - ex * ey
        var = (np.dot(w, np.square(x)) - ex**2) * (np.dot(w, np.square(y)) - ey**2)
        found["correlation"].append(cov / math.sqrt(var))
        said = [v for v in range(V) if weight[v] > 0]
        for name, role in (("kl_teacher", "student"), ("kl_raw", "student_raw")):
            found[name].append(sum(weight[v] * (math.log(weight[v]) - math.log(p[role][v])) for v in said))
        found["top1_agreement"].append(float(np.argmax(weight) == np.argmax(p["student"])))
        label = int(labels[n])
        found["nll"].append(-math.log(p["student"][label]))
        found["student_shift"].append(math.log(p["student"][label] / p["student_raw"][label]))
        found["teacher_shift"].append(math.log(p["teacher"][label] / p["teacher_raw"][label]))
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_against_numpy(logits: dict[str, Tensor], labels: Tensor, chunk_size: int) -> None:
    measured = shifts({role: identity_head(z) for role, z in logits.items()}, labels, chunk_size)
    expected = oracle(logits, labels)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(measured, name).numpy(), values, rtol=1e-6, atol=1e-9, err_msg=name)
    assert 0 < expected["top1_agreement"].sum() < N


def test_a_token_that_all_rule_out_plays_no_part(logits: dict[str, Tensor], labels: Tensor) -> None:
    bias = torch.zeros(V)
    bias[5] = -math.inf
    labels = labels.masked_fill(labels == 5, 6)
    measured = shifts({role: identity_head(z, bias) for role, z in logits.items()}, labels)
    without = {role: z.index_fill(1, torch.tensor([5]), -math.inf) for role, z in logits.items()}
    for name, values in oracle(without, labels).items():
        np.testing.assert_allclose(getattr(measured, name).numpy(), values, rtol=1e-6, atol=1e-9, err_msg=name)


def test_a_token_that_the_student_alone_rules_out(logits: dict[str, Tensor], labels: Tensor) -> None:
    """The KL to the teacher, who may say it, is infinite; the correlation is that of the other tokens."""
    bias = torch.zeros(V)
    bias[5] = -math.inf
    heads = {role: identity_head(z, bias if role == "student" else None) for role, z in logits.items()}
    measured = shifts(heads, labels)
    assert torch.isinf(measured.kl_teacher).all()
    assert torch.isfinite(measured.kl_raw).all()
    # Among the others all probabilities grow by one factor, which no correlation sees.
    everywhere = shifts({role: identity_head(z, bias) for role, z in logits.items()}, labels)
    torch.testing.assert_close(measured.correlation, everywhere.correlation)


@pytest.mark.parametrize(("factor", "expected"), [(0.3, 1.0), (2.0, 1.0), (-1.0, -1.0)])
def test_a_student_that_moved_along_the_teachers_shift(
    logits: dict[str, Tensor], labels: Tensor, factor: float, expected: float
) -> None:
    logits["student"] = logits["student_raw"] + factor * (logits["teacher"] - logits["teacher_raw"])
    measured = shifts({role: identity_head(z) for role, z in logits.items()}, labels)
    torch.testing.assert_close(measured.correlation, torch.full((N,), expected, dtype=torch.float64))


def test_no_shift_has_no_correlation(logits: dict[str, Tensor], labels: Tensor) -> None:
    heads = {role: identity_head(z) for role, z in logits.items()}
    still = shifts(heads | {"student": heads["student_raw"]}, labels)
    assert torch.isnan(still.correlation).all()
    torch.testing.assert_close(still.kl_teacher, still.kl_raw)
    assert not still.student_shift.any()
    # All logits raised alike, from far away: what is left is rounding.
    raised = {**heads, "teacher_raw": identity_head(logits["teacher"] + 1000.0)}
    assert torch.isnan(shifts(raised, labels).correlation).all()
    # A true shift of a tenth of a thousandth of a nat is seen.
    noise = 1e-4 * torch.randn(N, V, generator=torch.Generator().manual_seed(3))
    moved = heads | {"student": identity_head(logits["student_raw"] + noise)}
    assert torch.isfinite(shifts(moved, labels).correlation).all()


def test_half_precision_heads_are_upcast(logits: dict[str, Tensor], labels: Tensor) -> None:
    half = {role: z.bfloat16() for role, z in logits.items()}
    measured = shifts({role: identity_head(z) for role, z in half.items()}, labels)
    expected = oracle(half, labels)
    np.testing.assert_allclose(measured.correlation.numpy(), expected["correlation"], rtol=1e-6)


def test_no_tokens(logits: dict[str, Tensor]) -> None:
    heads = {role: identity_head(z[:0]) for role, z in logits.items()}
    assert shifts(heads, torch.empty(0, dtype=torch.int64)).correlation.shape == (0,)


def test_what_does_not_fit_is_refused(logits: dict[str, Tensor], labels: Tensor) -> None:
    heads = {role: identity_head(z) for role, z in logits.items()}
    with pytest.raises(ValueError, match=r"each of student, teacher, .*; given: student, teacher, student_raw"):
        shifts({role: head for role, head in heads.items() if role != "teacher_raw"}, labels)
    with pytest.raises(ValueError, match="same tokens"):
        shifts(heads | {"teacher": heads["teacher"].rows(0, 3)}, labels)
    with pytest.raises(ValueError, match="same tokens"):
        shifts(heads | {"student": identity_head(logits["student"][:, :-1])}, labels)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        shifts(heads, labels, 0)


def test_top_candidates(logits: dict[str, Tensor]) -> None:
    ids_NK, probabilities_NK = top_candidates(identity_head(logits["teacher"]), 5, chunk_size=4)
    p_NV = logits["teacher"].double().softmax(-1)
    assert ids_NK.tolist() == p_NV.argsort(-1, descending=True)[:, :5].tolist()
    torch.testing.assert_close(probabilities_NK, p_NV.gather(-1, ids_NK))
    assert top_candidates(identity_head(logits["teacher"]), 100)[0].shape == (N, V)
