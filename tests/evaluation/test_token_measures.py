"""Next-token measures against NumPy in float64, and calibration against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from deltakd.evaluation.token_measures import (
    CALIBRATION_BINS,
    calibration_bins,
    expected_calibration_error,
    token_measures,
)
from deltakd.types import ROLES, Head

N, V = 150, 23


def identity_head(logits_NV: Tensor) -> Head:
    return Head(logits_NV, torch.eye(logits_NV.shape[1], dtype=logits_NV.dtype))


@pytest.fixture
def logits() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {role: 3 * torch.randn(N, V, generator=draw) for role in ROLES}


@pytest.fixture
def labels(logits: dict[str, Tensor]) -> Tensor:
    """Half of them what the student would say."""
    random = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    return torch.where(torch.arange(N) % 2 == 0, logits["student"].argmax(-1), random)


def probabilities(logits_NV: Tensor) -> np.ndarray:
    e_NV = np.exp(logits_NV.double().numpy())
    return e_NV / e_NV.sum(-1, keepdims=True)


@pytest.mark.parametrize("chunk_size", [1, 37, 1000])
def test_against_numpy(logits: dict[str, Tensor], labels: Tensor, chunk_size: int) -> None:
    measured = token_measures({role: identity_head(z) for role, z in logits.items()}, labels, chunk_size)
    p = {role: probabilities(z) for role, z in logits.items()}
    student, teacher, at = p["student"], p["teacher"], (np.arange(N), labels.numpy())
    np.testing.assert_allclose(measured.nll.numpy(), -np.log(student[at]), rtol=1e-9)
    np.testing.assert_allclose(measured.confidence.numpy(), student.max(-1), rtol=1e-9)
    np.testing.assert_array_equal(measured.correct.numpy(), student.argmax(-1) == labels.numpy())
    kl = (teacher * (np.log(teacher) - np.log(student))).sum(-1)
    np.testing.assert_allclose(measured.kl_teacher.numpy(), kl, rtol=1e-9)
    raw = p["student_raw"]
    moved = (raw * (np.log(raw) - np.log(student))).sum(-1)
    np.testing.assert_allclose(measured.kl_raw_student.numpy(), moved, rtol=1e-9)
    np.testing.assert_array_equal(measured.top1_agreement.numpy(), student.argmax(-1) == teacher.argmax(-1))
    x, y = (np.log(p[a]) - np.log(p[b]) for a, b in (("student", "student_raw"), ("teacher", "teacher_raw")))
    cov = [np.cov(np.stack([x[n], y[n]]), aweights=teacher[n], ddof=0) for n in range(N)]
    correlation = [c[0, 1] / math.sqrt(c[0, 0] * c[1, 1]) for c in cov]
    np.testing.assert_allclose(measured.correlation.numpy(), correlation, rtol=1e-6, atol=1e-9)
    assert (measured.kl_raw, measured.student_shift, measured.teacher_shift) == (None, None, None)
    # What is asked for besides changes none of it.
    more = token_measures({role: identity_head(z) for role, z in logits.items()}, labels, chunk_size, with_shifts=True)
    for name in ("nll", "confidence", "correct", "kl_teacher", "kl_raw_student", "top1_agreement", "correlation"):
        torch.testing.assert_close(getattr(more, name), getattr(measured, name), rtol=0, atol=0)


def test_a_tie_of_the_students_favourites_agrees_with_a_teacher_who_has_one_of_them() -> None:
    """Two argmax would say by the order of the vocabulary whether they agree."""
    student = torch.tensor([[1.0, 2.0, 2.0], [2.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    teacher = torch.tensor([[0.0, 1.0, 3.0], [3.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    heads = {"student": identity_head(student), "teacher": identity_head(teacher)}
    assert token_measures(heads, torch.zeros(3, dtype=torch.int64)).top1_agreement.tolist() == [1, 1, 0]


def test_what_heads_are_not_there_is_not_measured(logits: dict[str, Tensor], labels: Tensor) -> None:
    heads = {role: identity_head(z) for role, z in logits.items()}
    alone = token_measures({"student": heads["student"]}, labels)
    assert (alone.kl_teacher, alone.top1_agreement, alone.correlation) == (None, None, None)
    taught = token_measures({role: heads[role] for role in ("student", "teacher")}, labels)
    assert taught.correlation is None
    torch.testing.assert_close(taught.kl_teacher, token_measures(heads, labels).kl_teacher)
    nothing = token_measures({role: head.rows(0, 0) for role, head in heads.items()}, labels[:0])
    assert nothing.nll.shape == nothing.correlation.shape == (0,)
    for given, message in (
        ({"teacher": heads["teacher"]}, "need a head of the student; given: teacher"),
        (heads | {"teacher": heads["teacher"].rows(0, 3)}, "same tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            token_measures(given, labels)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        token_measures(heads, labels, 0)


def test_calibration_by_its_definition(logits: dict[str, Tensor], labels: Tensor) -> None:
    measured = token_measures({"student": identity_head(logits["student"])}, labels)
    confidence, correct = measured.confidence.numpy(), measured.correct.numpy()
    expected = 0.0
    for m in range(1, CALIBRATION_BINS + 1):
        inside = (confidence > (m - 1) / CALIBRATION_BINS) & (confidence <= m / CALIBRATION_BINS)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    bins = calibration_bins(measured.confidence, measured.correct)
    assert expected_calibration_error(bins) == pytest.approx(expected, rel=1e-12)
    # Parts of the tokens add up.
    parts = [calibration_bins(measured.confidence[part], measured.correct[part]) for part in (slice(40), slice(40, N))]
    torch.testing.assert_close(parts[0] + parts[1], bins)


def test_calibration_of_easy_cases() -> None:
    ones, zeros = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    assert expected_calibration_error(calibration_bins(ones, ones)) == 0.0
    assert expected_calibration_error(calibration_bins(ones, zeros)) == 1.0
    # 0.6 sure and right in three of five: calibrated, since only means of a bin count.
    three = torch.tensor([1, 1, 1, 0, 0], dtype=torch.float64)
    assert expected_calibration_error(calibration_bins(torch.full((5,), 0.6).double(), three)) == pytest.approx(
        0, abs=1e-7
    )
    assert math.isnan(expected_calibration_error(calibration_bins(ones[:0], ones[:0])))
