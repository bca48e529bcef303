"""Every target of docs/design.md#targets, with its treatments, against NumPy float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deltakd.losses import (
    Distillation,
    ForwardKL,
    Target,
    Treatment,
    bilinear_target,
    delta_target,
    multi_teacher_target,
    shift_target,
    taid_target,
    teacher_target,
)
from tests.losses import oracles
from tests.losses.by_name import loss_named
from tests.losses.oracles import Array, Logits, arrays, close, draw, gradient, log_softmax, mixed

THREE = {"teacher", "teacher_raw", "student_raw"}
FIVE = THREE | {"teacher_2", "teacher_raw_2"}
Make = Callable[..., Target]
Oracle = Callable[..., Array]

#: Target by its treatment, its oracle, and what it reads.
SHIFTED: dict[str, tuple[Make, Oracle, set[str]]] = {
    "delta": (lambda t: delta_target(0.7, t), lambda z, **t: oracles.delta_target(z, 0.7, **t), THREE),
    "delta_negative": (lambda t: delta_target(-1.3, t), lambda z, **t: oracles.delta_target(z, -1.3, **t), THREE),
    "shift": (lambda t: shift_target(1.4, t), lambda z, **t: oracles.shift_target(z, 1.4, **t), THREE),
    "bilinear": (
        lambda t: bilinear_target(0.6, -0.3, t),
        lambda z, **t: oracles.bilinear_target(z, 0.6, -0.3, **t),
        THREE,
    ),
    "multi_teacher": (
        lambda t: multi_teacher_target([0.4, 0.9], 0.8, t),
        lambda z, **t: oracles.multi_teacher_target(z, (0.4, 0.9), 0.8, **t),
        FIVE,
    ),
}
TREATMENTS: dict[str, dict[str, Any]] = {
    "untreated": {},
    "centre": {"centre": "student_raw"},
    "clip": {"clip": 1.5},
    "mask": {"mask": 0.1},
    "mask_by": {"mask": 0.3, "mask_by": "student_raw"},
    "all": {"centre": "teacher_raw", "clip": 2.0, "mask": 0.05, "mask_by": "teacher"},
}


def distribution(target: Target, logits: dict[str, Tensor], tau: float = 1.0) -> Tensor:
    return (target(logits) / tau).log_softmax(-1)


@pytest.mark.parametrize("treatment", TREATMENTS.values(), ids=TREATMENTS.keys())
@pytest.mark.parametrize("name", SHIFTED)
def test_values(name: str, treatment: dict[str, Any]) -> None:
    make, oracle, reads = SHIFTED[name]
    target = make(Treatment(**treatment))
    assert target.requires == reads
    logits, _ = draw()
    only = {role: logits[role] for role in reads}
    expected = oracle(arrays(logits), **treatment)
    for tau in (0.5, 1.0, 3.0):
        close(distribution(target, only, tau), log_softmax(expected / tau))
    assert not target(only).requires_grad
    if set(treatment) - {"centre"}:  # To centre alone is a constant a row: identity 6.
        assert np.abs(log_softmax(expected) - log_softmax(oracle(arrays(logits)))).max() > 0.05


def test_the_order_of_the_treatments() -> None:
    """Centre, then clip, then mask: by hand on one row. The other orders give other numbers."""
    p = {"teacher": [0.6, 0.3, 0.08, 0.02], "teacher_raw": [0.25] * 4, "student_raw": [0.1, 0.2, 0.3, 0.4]}
    logits = {role: torch.tensor([row], dtype=torch.float64).log() for role, row in p.items()}
    delta = np.log(np.array(p["student_raw"]) * 4)
    centred = np.clip(delta - (np.array(p["teacher"]) * delta).sum(), -0.5, 0.5)
    # Implausible: 0.02 < 0.1 · 0.6. 0.08 is plausible, and 0.06 would be just.
    expected = np.log(p["teacher"]) + centred * [1, 1, 1, 0]
    target = delta_target(1.0, Treatment(centre="teacher", clip=0.5, mask=0.1))
    close(target(logits).log_softmax(-1), log_softmax(expected[None]))


def test_a_mask_keeps_its_edge() -> None:
    """p_ref = m · max p_ref is plausible."""
    logits = {role: torch.zeros(1, 4, dtype=torch.float64) for role in THREE}
    logits["student_raw"] = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    masked = delta_target(1.0, Treatment(mask=1.0))(logits).log_softmax(-1)
    torch.testing.assert_close(masked, logits["student_raw"].log_softmax(-1))


def test_teacher() -> None:
    logits, _ = draw()
    assert teacher_target().requires == {"teacher"}
    close(
        distribution(teacher_target(), {"teacher": logits["teacher"]}, 1.7),
        log_softmax(arrays(logits)["teacher"] / 1.7),
    )


@pytest.mark.parametrize("start", [0.0, 0.4, 0.9])
def test_taid(start: float) -> None:
    """The student itself, detached, on the way to the teacher."""
    target = taid_target(start)
    logits, labels = draw()
    assert target.requires == {"teacher"}
    close(distribution(target, logits, 2.0), log_softmax(oracles.taid_target(arrays(logits), start) / 2.0))
    loss = Distillation(target, ForwardKL(), temperature=2.0, ce_weight=0.0)
    z = arrays(logits)
    pull = np.exp(log_softmax(z["student"] / 2)) - np.exp(log_softmax(oracles.taid_target(z, start) / 2))
    close(gradient(loss, logits, labels), pull / 2)


def test_a_weight_of_zero_is_not_read() -> None:
    by = Treatment(centre="student_raw", mask=0.1, mask_by="teacher_2")
    assert delta_target(0.0, by).requires == {"teacher"}
    assert shift_target(0, by).requires == {"student_raw"}
    assert bilinear_target(0, 1.0).requires == {"teacher", "teacher_raw"}
    assert bilinear_target(1.0, 0).requires == {"student_raw", "teacher_raw"}
    assert multi_teacher_target([1.0, 0.0]).requires == THREE
    assert multi_teacher_target([0.0, 1.0]).requires == {"student_raw", "teacher_2", "teacher_raw_2"}
    assert delta_target(1.0, by).requires == FIVE - {"teacher_raw_2"}
    moving = {"schedule": "linear", "from": 0, "to": 1, "steps": None}
    assert delta_target(moving).requires == THREE


def test_schedules_are_those_of_moving_weights() -> None:
    moving = {"schedule": "linear", "from": 0, "to": 1, "steps": None}
    assert set(delta_target(moving).schedules) == {"delta_weight"}
    assert delta_target(0.5).schedules == {}
    assert set(taid_target().schedules) == {"taid_weight"}
    (schedule,) = multi_teacher_target([1.0, 2.0], moving).schedules.values()
    schedule.load_state_dict({"value": 0.25})
    logits, _ = draw()
    close(
        distribution(multi_teacher_target([1.0, 2.0], schedule), logits),
        log_softmax(oracles.multi_teacher_target(arrays(logits), (1.0, 2.0), 0.25)),
    )


@pytest.mark.parametrize("treatment", [{}, TREATMENTS["all"]], ids=["untreated", "treated"])
@pytest.mark.parametrize("name", [*SHIFTED, "taid", "teacher"])
def test_a_ruled_out_token_has_no_target_mass(name: str, treatment: dict[str, Any]) -> None:
    """A logit of −inf in any role that is read; the others are as they are without the token."""
    if name in SHIFTED:
        make, oracle, reads = SHIFTED[name]
        target = make(Treatment(**treatment))
    else:
        target, reads = {"taid": (taid_target(), {"teacher"}), "teacher": (teacher_target(), {"teacher"})}[name]

        def oracle(z: Logits, **_: Any) -> Array:
            return oracles.taid_target(z, 0.4) if name == "taid" else z["teacher"]

    for role in sorted(reads):
        logits, labels = draw()
        logits[role][:, 3] = -math.inf
        log_p = distribution(target, logits)
        assert torch.isneginf(log_p[:, 3]).all()
        close(log_p, log_softmax(oracle(arrays(logits), **treatment)))
        loss = Distillation(target, ForwardKL(), ce_weight=0.5)
        assert torch.isfinite(loss(logits, labels).per_token).all()
        assert torch.isfinite(gradient(loss, logits, labels)).all()
        where = set(range(23)) - {3}
        others = [z for r, z in logits.items() if r in reads and r != role]
        if not treatment and others:
            rest = {r: z[:, sorted(where)] for r, z in logits.items()}
            torch.testing.assert_close(log_p[:, sorted(where)], distribution(target, rest))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("treatment", [{}, TREATMENTS["all"]], ids=["untreated", "treated"])
def test_sums_are_made_in_at_least_float32(dtype: torch.dtype, treatment: dict[str, Any]) -> None:
    logits, _ = draw(scale=10.0)
    logits = {role: z.detach().to(dtype) for role, z in logits.items()}
    result = delta_target(0.7, Treatment(**treatment))(logits)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = oracles.delta_target(arrays(logits), 0.7, **treatment)
    close(result.double().log_softmax(-1), log_softmax(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("tau", "ce_weight"), [(1.0, 0.5), (1.7, 0.3), (0.6, 0.0)])
def test_distillation_to_a_target(tau: float, ce_weight: float, squared: bool) -> None:
    """τ divides the composed logits and the student's, once; CE is at τ = 1; λ and τ² as in docs/design.md#delta-kd."""
    logits, labels = draw()
    loss = Distillation(delta_target(0.7, Treatment(**TREATMENTS["all"])), ForwardKL(), tau, ce_weight, squared)
    z = arrays(logits)
    log_p = log_softmax(oracles.delta_target(z, 0.7, **TREATMENTS["all"]) / tau)

    def expected(student: Array) -> Array:
        ce = oracles.cross_entropy(student, labels.numpy())
        return mixed(ce, oracles.forward_kl(log_p, log_softmax(student / tau)), ce_weight, tau, squared)

    output = loss(logits, labels)
    close(output.per_token, expected(z["student"]))
    close(output.parts["ce"], oracles.cross_entropy(z["student"], labels.numpy()))
    close(output.parts["forward_kl"], oracles.forward_kl(log_p, log_softmax(z["student"] / tau)))
    assert set(output.parts) == {"ce", "forward_kl"}
    close(gradient(loss, logits, labels), oracles.numeric_gradient(expected, z["student"]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: delta_target(math.inf), r"delta_weight is inf; it must be a finite number"),
        (lambda: delta_target("much"), r"delta_weight is 'much'; it must be a finite number"),
        (lambda: bilinear_target(1.0, math.nan), r"loss\.target\.v is nan; it must be a finite number"),
        (lambda: multi_teacher_target([]), r"loss\.target\.weights is \[\]; give one finite number for each pair"),
        (lambda: multi_teacher_target([1.0, math.inf]), r"loss\.target\.weights is \[1\.0, inf\]; give one finite"),
        (
            lambda: Treatment(centre="student", clip=0.0, mask=1.5, mask_by="nobody"),
            r"treatment\.centre is 'student'; allowed: teacher, .*treatment\.mask_by is 'nobody'; .*"
            r"treatment\.clip is 0\.0; it must be .*above 0.*treatment\.mask is 1\.5; it must be above 0 and at most 1",
        ),
        (lambda: Treatment(mask=0.0), r"treatment\.mask is 0\.0; it must be above 0 and at most 1, or null"),
        (lambda: Treatment(clip=math.inf), r"treatment\.clip is inf; it must be a finite number of nats above 0"),
        (lambda: taid_target(1.0), r"loss\.target\.start is 1\.0; it must be at least 0 and below 1"),
        (
            lambda: Distillation(teacher_target(), ForwardKL(), temperature=0, ce_weight=1.5),
            r"loss\.temperature is 0; .*above 0; loss\.ce_weight is 1\.5; it must be between 0 .* and 1",
        ),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_role_is_named() -> None:
    logits, labels = draw()
    loss = Distillation(delta_target(1.0), ForwardKL())
    with pytest.raises(ValueError, match=r"the target reads student_raw, teacher_raw, but logits were given for stud"):
        loss({"student": logits["student"], "teacher": logits["teacher"]}, labels)


RISING = {"schedule": "linear", "from": 0.5, "to": 2.0, "steps": None}


@pytest.mark.parametrize(
    ("name", "delta_weight", "options", "factor"),
    [
        ("kd", 3.0, {}, 1.0),
        ("delta_kd", 3.0, {}, 1.0),
        ("delta_shift", 1.5, {}, 1.5),
        ("delta_shift", RISING, {}, 2.0),
        ("delta_bilinear", 3.0, {"target__v": 1.4}, 1.4),
        ("delta_multi_teacher", 1.0, {"target__weights": [0.9, 0.6]}, 1.5),
        ("delta_multi_teacher", RISING, {"target__weights": [0.9, -0.5]}, 0.8),
        ("parallelogram", 1.5, {}, 1.5),
        ("taid", 1.0, {}, 1.0),
        ("exopd", 1.0, {"scale": 1.4}, 1.4),
        ("exopd", 1.0, {"scale": 1.4, "reference": "teacher_raw"}, 1.4),
        ("opd2", 1.0, {}, 1.0),
        ("minillm", 1.0, {}, 1.0),
    ],
)
def test_the_largest_factor_on_the_teacher_is_known(
    name: str, delta_weight: object, options: dict[str, object], factor: float
) -> None:
    assert loss_named(name, delta_weight=delta_weight, **options).teacher_factor == pytest.approx(factor)
