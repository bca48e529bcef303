"""The parallel variants and the parallelograms of docs/design.md#parallel against NumPy float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from deltakd.losses import (
    DeltaMatching,
    DistillationPlusMatching,
    ForwardKL,
    JensenShannon,
    LogitMatching,
    Parallelogram,
    RatioMatching,
    SignedParallelogram,
    Treatment,
)
from deltakd.types import Loss, Progress
from tests.losses import oracles
from tests.losses.by_name import loss_named
from tests.losses.oracles import Array, Logits, arrays, close, draw, gradient, log_softmax, mixed, numeric_gradient

RATIO = ("teacher", "teacher_raw", "student_raw")
CROSS = ("student_raw", "teacher_raw", "teacher")
THREE = {"teacher", "teacher_raw", "student_raw"}
MASK = {"mask": 0.1}
ALL = {"centre": "teacher_raw", "clip": 1.5, "mask": 0.05, "mask_by": "student_raw"}
CORNERS = ("teacher", "student_raw", "delta", "shift")


def check(
    loss: Loss,
    expected: Callable[[Logits], Array],
    parts: str | dict[str, Callable[[Logits], Array]],
    ce_weight: float,
    **scaling: Any,
) -> None:
    """Value, parts and gradient of a loss; ``expected`` is its term, from logits by role, and its part by default."""
    logits, labels = draw()
    z = arrays(logits)

    def whole(student: Array) -> Array:
        ce = oracles.cross_entropy(student, labels.numpy())
        return mixed(ce, expected({**z, "student": student}), ce_weight, **scaling)

    output = loss({role: logits[role] for role in {"student", *loss.requires}}, labels)
    close(output.per_token, whole(z["student"]))
    for name, part in ({parts: expected} if isinstance(parts, str) else parts).items():
        close(output.parts[name], part(z))
    assert set(output.parts) == {"ce", *([parts] if isinstance(parts, str) else parts)}
    close(gradient(loss, logits, labels), numeric_gradient(whole, z["student"]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("treatment", [{}, MASK, {"centre": "teacher"}, {"clip": 1.5}, ALL], ids=str)
@pytest.mark.parametrize("roles", [RATIO, CROSS], ids=["ratio", "cross"])
def test_ratio(roles: tuple[str, str, str], treatment: dict[str, Any], tau: float) -> None:
    loss = DeltaMatching(RatioMatching(*roles, treatment=Treatment(**treatment)), temperature=tau, ce_weight=0.3)
    assert loss.requires == THREE
    check(loss, lambda z: oracles.ratio_kl(z, roles, tau, **{"mask": None, **treatment}), "ratio_kl", 0.3)


def test_ratio_is_masked_unless_told() -> None:
    """And where its target is met, 0 in value and gradient; the tokens outside get no gradient."""
    loss = DeltaMatching(RatioMatching(), ce_weight=0.0)
    check(loss, oracles.ratio_kl, "ratio_kl", 0.0)
    logits, labels = draw()
    kept = torch.from_numpy(oracles.plausible(arrays(logits), 0.1, "teacher"))
    pull = gradient(loss, logits, labels)
    assert 0 < kept.sum() < kept.numel()
    assert pull[~kept].abs().max() < 1e-14 < pull[kept].abs().max()
    met = logits["student_raw"] + logits["teacher"] - logits["teacher_raw"] + 4.0
    there = logits | {"student": met.clone().requires_grad_()}
    assert loss(there, labels).per_token.abs().max() < 1e-12
    assert gradient(loss, there, labels).abs().max() < 1e-12


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("treatment", [{}, MASK, ALL], ids=str)
@pytest.mark.parametrize("weighting", ["teacher", "uniform", "student", "student_raw"])
def test_logit_variance(weighting: str, treatment: dict[str, Any], tau: float) -> None:
    """The student's weights are detached: they stand still in the finite differences."""
    frozen = arrays(draw()[0])["student"]
    matching = LogitMatching(weighting, 0.7, treatment=Treatment(**treatment))
    loss = DeltaMatching(matching, temperature=tau, ce_weight=0.3, temperature_squared=True)
    assert loss.requires == THREE

    def expected(z: Logits) -> Array:
        return oracles.logit_variance(z, weighting, 0.7, tau, frozen, **treatment)

    check(loss, expected, "logit_variance", 0.3, tau=tau, squared=True)


@pytest.mark.parametrize("weighting", ["teacher", "uniform", "student", "student_raw"])
def test_logit_variance_is_zero_where_the_shift_is_met(weighting: str) -> None:
    logits, labels = draw()
    met = logits["student_raw"] + 0.7 * (logits["teacher"] - logits["teacher_raw"]) - 3.0
    there = logits | {"student": met.clone().requires_grad_()}
    loss = DeltaMatching(LogitMatching(weighting, 0.7), ce_weight=0.0)
    assert loss(there, labels).per_token.abs().max() < 1e-12
    assert gradient(loss, there, labels).abs().max() < 1e-12


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("ratio", [False, True])
def test_distillation_plus_matching(ratio: bool, tau: float) -> None:
    matching = RatioMatching() if ratio else LogitMatching(beta=0.8)
    loss = DistillationPlusMatching(
        ForwardKL(), matching, 1.3, temperature=tau, ce_weight=0.3, temperature_squared=True
    )

    def matched(z: Logits) -> Array:
        return oracles.ratio_kl(z, tau=tau) if ratio else oracles.logit_variance(z, beta=0.8, tau=tau)

    def distilled(z: Logits) -> Array:
        return oracles.forward_kl(log_softmax(z["teacher"] / tau), log_softmax(z["student"] / tau))

    def expected(z: Logits) -> Array:
        return distilled(z) + 1.3 * matched(z)

    parts = {"forward_kl": distilled, matching.name: matched}
    check(loss, expected, parts, 0.3, tau=tau, squared=True)
    assert loss.requires == THREE
    alone = DistillationPlusMatching(ForwardKL(), matching, 0)
    logits, labels = draw()
    assert alone.requires == {"teacher"}
    assert set(alone({role: logits[role] for role in ("student", "teacher")}, labels).parts) == {"ce", "forward_kl"}


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("treatment", [{}, ALL], ids=str)
@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon()], ids=["forward_kl", "jsd"])
def test_parallelogram(divergence: ForwardKL | JensenShannon, treatment: dict[str, Any], tau: float) -> None:
    """The weights are divided by their sum; every corner is a part."""
    oracle = {"forward_kl": oracles.forward_kl, "jsd": oracles.jsd}[divergence.name]
    weights = dict(zip(CORNERS, (1.0, 0.5, 2.0, 1.5), strict=True))
    loss = Parallelogram(weights, divergence, 0.7, Treatment(**treatment), temperature=tau, ce_weight=0.3)

    def corner(z: Logits, name: str) -> Array:
        targets = {
            "teacher": z["teacher"],
            "student_raw": z["student_raw"],
            "delta": oracles.delta_target(z, 0.7, **treatment),
            "shift": oracles.shift_target(z, 0.7, **treatment),
        }
        return oracle(log_softmax(targets[name] / tau), log_softmax(z["student"] / tau))

    def expected(z: Logits) -> Array:
        return sum(weights[name] / 5 * corner(z, name) for name in CORNERS)

    parts = {f"{divergence.name}_{name}": functools.partial(corner, name=name) for name in CORNERS}
    check(loss, expected, parts, 0.3)


@pytest.mark.parametrize(
    ("weights", "delta_weight", "reads"),
    [
        ({"teacher": 2.0, "student_raw": 0, "delta": 0, "shift": 0}, 1.0, {"teacher"}),
        ({"student_raw": 0.1}, 1.0, {"student_raw"}),
        ({"teacher": 1, "student_raw": 1}, 1.0, {"teacher", "student_raw"}),
        ({"teacher": 1, "delta": 1}, 1.0, THREE),
        ({"teacher": 1, "delta": 1}, 0.0, {"teacher"}),
        ({"shift": 1}, 0.0, {"student_raw"}),
    ],
)
def test_a_corner_without_weight_is_not_read(weights: dict[str, float], delta_weight: float, reads: set[str]) -> None:
    loss = Parallelogram(weights, ForwardKL(), delta_weight)
    assert loss.requires == reads
    logits, labels = draw()
    assert torch.isfinite(loss({role: logits[role] for role in {"student", *reads}}, labels).per_token).all()


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.7, 1.0, -0.5, 3.0])
@pytest.mark.parametrize("unsafe", [False, True])
def test_signed_parallelogram(unsafe: bool, alpha: float, tau: float) -> None:
    oracle = oracles.signed_unsafe if unsafe else oracles.signed_safe
    loss = SignedParallelogram(alpha, unsafe, temperature=tau, ce_weight=0.3)
    assert loss.requires == THREE
    check(loss, lambda z: oracle(z, alpha, tau), "signed_kl", 0.3)


@pytest.mark.parametrize("unsafe", [False, True])
def test_signed_parallelogram_without_a_shift_is_kd(unsafe: bool) -> None:
    loss = SignedParallelogram(0.0, unsafe, temperature=2.0)
    assert loss.requires == {"teacher"}
    check(
        loss,
        lambda z: oracles.forward_kl(log_softmax(z["teacher"] / 2), log_softmax(z["student"] / 2)),
        "signed_kl",
        0.5,
    )


def test_where_no_mass_is_negative_safe_and_unsafe_pull_alike() -> None:
    """Then the two differ by a constant: the target's own entropy."""
    logits, labels = draw(scale=0.1)
    z = arrays(logits)
    mass = sum(f * np.exp(log_softmax(z[r])) for r, f in [("teacher", 1), ("student_raw", 0.5), ("teacher_raw", -0.5)])
    assert mass.min() > 0
    pulls = [gradient(SignedParallelogram(0.5, unsafe, ce_weight=0.0), logits, labels) for unsafe in (False, True)]
    torch.testing.assert_close(*pulls, rtol=1e-10, atol=1e-13)


def test_the_signed_formula_is_unbounded_below() -> None:
    """The target mass of token 0 is 0.1 + (0.1 − 0.8) = −0.6: as the student gives it up, the literal loss falls."""
    p = {"teacher": [0.1, 0.9], "student_raw": [0.1, 0.9], "teacher_raw": [0.8, 0.2]}
    logits = {role: torch.tensor([row], dtype=torch.float64).log() for role, row in p.items()}
    values = {True: [], False: []}
    for z in (0.0, -10.0, -100.0, -1e4):
        student = {"student": torch.tensor([[z, 0.0]], dtype=torch.float64)}
        for unsafe, seen in values.items():
            seen.append(SignedParallelogram(1.0, unsafe, ce_weight=0.0)(logits | student, torch.tensor([1])))
    literal = [output.per_token.item() for output in values[True]]
    assert literal == sorted(literal, reverse=True)
    # The slope in log π_0 is +0.6: −Σ m log π, m = (−0.6, 1.6).
    assert literal[3] - literal[2] == pytest.approx(0.6 * (-1e4 + 100))
    assert min(output.per_token.item() for output in values[False]) >= -1e-15


@pytest.mark.parametrize("weighting", LogitMatching.WEIGHTINGS)
def test_a_variance_leaves_out_what_the_student_rules_out(weighting: str) -> None:
    logits, labels = draw()
    with torch.no_grad():
        logits["student"][:, 3] = -math.inf
    loss = DeltaMatching(LogitMatching(weighting), ce_weight=0.0)
    z = arrays(logits)
    close(loss(logits, labels).per_token, oracles.logit_variance(z, weighting))
    expected = numeric_gradient(
        lambda moved: oracles.logit_variance({**z, "student": moved}, weighting, frozen=z["student"]), z["student"]
    )
    close(gradient(loss, logits, labels), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("role", ["student", *sorted(THREE)])
def test_ruled_out_tokens_are_left_out(role: str) -> None:
    """Of the ratios and the variance; no NaN, and no pull on them."""
    for matching, oracle in (
        (RatioMatching(treatment=Treatment(mask=0.01)), lambda z: oracles.ratio_kl(z, mask=0.01)),
        (RatioMatching(*CROSS, Treatment()), lambda z: oracles.ratio_kl(z, CROSS, mask=None)),
        (LogitMatching(), oracles.logit_variance),
        (LogitMatching("uniform"), lambda z: oracles.logit_variance(z, "uniform")),
    ):
        logits, labels = draw()
        logits[role].data[:, 3] = -math.inf
        loss = DeltaMatching(matching, ce_weight=0.0)
        close(loss(logits, labels).per_token, oracle(arrays(logits)))
        pull = gradient(loss, logits, labels)
        assert torch.isfinite(pull).all()


@pytest.mark.parametrize(
    "matching", [RatioMatching(), LogitMatching(treatment=Treatment(mask=0.1))], ids=["ratio", "logit"]
)
def test_no_token_left_is_no_nan(matching: RatioMatching | LogitMatching) -> None:
    """The only plausible token is one that a model rules out: nothing is left to compare, and nothing to pull at."""
    logits, labels = draw(n=2, v=4)
    logits["teacher"][0] = torch.tensor([50.0, 0.0, 0.0, 0.0])
    logits["teacher_raw"][0, 0] = -math.inf
    loss = DeltaMatching(matching, ce_weight=0.0)
    assert torch.isfinite(loss(logits, labels).per_token).all()
    assert torch.isfinite(gradient(loss, logits, labels)).all()


def test_every_moving_weight_moves() -> None:
    """γ and the β of the matching are two schedules, under two names."""
    moving = {"schedule": "linear", "from": 0.5, "to": 1.0, "steps": None}
    loss = loss_named("kd_plus_delta", delta_weight=moving, matching__beta=moving)
    for schedule in loss.schedules.values():
        schedule.on_step(Progress(4, 4), 1.0)
    logits, labels = draw()
    there = loss_named("kd_plus_delta", delta_weight=1.0, matching__beta=1.0)
    torch.testing.assert_close(loss(logits, labels).per_token, there(logits, labels).per_token)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitMatching("everything"), r"weighting is 'everything'; allowed: teacher, uniform, student, stude"),
        (lambda: LogitMatching(beta=math.inf), r"loss.matching.beta is inf; it must be a finite number"),
        (lambda: DistillationPlusMatching(ForwardKL(), RatioMatching(), -1), r"delta_weight is -1.*at least 0"),
        (
            lambda: DistillationPlusMatching(
                ForwardKL(), RatioMatching(), {"schedule": "linear", "from": 1, "to": -0.5, "steps": 3}
            ),
            r"delta_weight is -0\.5; for this loss it must be at least 0",
        ),
        (lambda: SignedParallelogram(math.nan), r"delta_weight is nan; it must be a finite number"),
        (
            lambda: Parallelogram({"techer": 1.0, "teacher": -1.0}, ForwardKL()),
            r"loss\.weights has 'techer', which is not a corner; corners are teacher, student_raw, delta, shift; "
            r"loss\.weights\.teacher is -1\.0; it must be a finite number from 0",
        ),
        (lambda: Parallelogram({"teacher": 0.0}, ForwardKL()), r"loss\.weights is .*add up to 0.*must be above 0"),
        (lambda: Parallelogram({}, ForwardKL()), r"loss\.weights is \{\}: they add up to 0"),
        (lambda: DeltaMatching(RatioMatching(), temperature=math.inf), r"loss\.temperature is inf; .* above 0"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
