"""Every divergence of docs/design.md#divergences against NumPy float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from deltakd.losses import (
    AdaptiveKL,
    AlphaBeta,
    Divergence,
    ForwardKL,
    JensenShannon,
    LogitMSE,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    ToDi,
    TotalVariation,
)
from tests.losses import oracles
from tests.losses.oracles import Array, close, log_softmax, numeric_gradient

Oracle = Callable[..., Array]
CASES: dict[str, tuple[Divergence, Oracle]] = {
    "forward_kl": (ForwardKL(), oracles.forward_kl),
    "reverse_kl": (ReverseKL(), oracles.reverse_kl),
    "symmetric_kl": (SymmetricKL(), oracles.symmetric_kl),
    "symmetric_kl_0.3": (SymmetricKL(0.3), functools.partial(oracles.symmetric_kl, weight=0.3)),
    "jsd": (JensenShannon(), oracles.jsd),
    "jsd_0.9": (JensenShannon(0.9), functools.partial(oracles.jsd, beta=0.9)),
    "tvd": (TotalVariation(), oracles.tvd),
    "skew_forward_kl": (SkewForwardKL(), oracles.skew_forward_kl),
    "skew_forward_kl_0.8": (SkewForwardKL(0.8), functools.partial(oracles.skew_forward_kl, skew=0.8)),
    "skew_reverse_kl": (SkewReverseKL(), oracles.skew_reverse_kl),
    "skew_reverse_kl_0.8": (SkewReverseKL(0.8), functools.partial(oracles.skew_reverse_kl, skew=0.8)),
    "adaptive_kl": (AdaptiveKL(), oracles.adaptive_kl),
    "adaptive_kl_0.9": (AdaptiveKL(0.9), functools.partial(oracles.adaptive_kl, head_mass=0.9)),
    "todi": (ToDi(), oracles.todi),
    "alpha_beta": (AlphaBeta(), oracles.alpha_beta),
    "alpha_beta_1.5_0.3": (AlphaBeta(1.5, 0.3), functools.partial(oracles.alpha_beta, alpha=1.5, beta=0.3)),
    "alpha_beta_1_0": (AlphaBeta(1, 0), functools.partial(oracles.alpha_beta, alpha=1, beta=0)),
    "alpha_beta_0_1": (AlphaBeta(0, 1), functools.partial(oracles.alpha_beta, alpha=0, beta=1)),
    "alpha_beta_0_0": (AlphaBeta(0, 0), functools.partial(oracles.alpha_beta, alpha=0, beta=0)),
    "logit_mse": (LogitMSE(), oracles.logit_mse),
}
ALL = pytest.mark.parametrize(("divergence", "oracle"), CASES.values(), ids=CASES.keys())


def pair(scale: float = 2.0, n: int = 9, v: int = 17) -> tuple[Tensor, Tensor]:
    """Target and student logits; the last row of the target is flat, so that AKL's head has more than one token."""
    generator = torch.Generator().manual_seed(3)
    target, student = scale * torch.randn(2, n, v, generator=generator, dtype=torch.float64)
    target[-1] *= 0.1
    return target, student.requires_grad_()


def evaluate(divergence: Divergence, target: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    value_N = divergence(target.log_softmax(-1), student.log_softmax(-1))
    (gradient,) = torch.autograd.grad(value_N.sum(), student)
    return value_N, gradient


@ALL
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_values_and_gradients(divergence: Divergence, oracle: Oracle, scale: float) -> None:
    """The weights that AKL and ToDi detach stand still in the finite differences (docs/design.md#identities)."""
    target, student = pair(scale)
    value_N, gradient = evaluate(divergence, target, student)
    log_p, z = log_softmax(target.numpy()), student.detach().numpy()
    close(value_N, oracle(log_p, log_softmax(z)))
    assert (oracle(log_p, log_softmax(z)) > 0).all()
    frozen = {"frozen": log_softmax(z)} if divergence.name in ("adaptive_kl", "todi") else {}
    expected = numeric_gradient(lambda moved: oracle(log_p, log_softmax(moved), **frozen), z)
    close(gradient, expected, rtol=1e-6, atol=1e-8)


@ALL
def test_identity_8_zero_at_the_target(divergence: Divergence, oracle: Oracle) -> None:
    """And so is the gradient there, TVD's kink apart; a constant more in the logits is the same distribution."""
    target, _ = pair()
    value_N, gradient = evaluate(divergence, target, (target + 5.0).requires_grad_())
    assert value_N.abs().max() < 1e-13
    if divergence.name != "tvd":
        assert gradient.abs().max() < 1e-13
    value_N, _ = evaluate(divergence, target, target.clone().requires_grad_())
    assert value_N.abs().max() < 1e-14


def test_the_weights_of_akl() -> None:
    """½ at equality; the head is the top tokens up to the mass, and the first one in any case."""
    p = torch.tensor([[0.3, 0.15, 0.3, 0.25], [0.9, 0.04, 0.03, 0.03]], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.25, 0.2, 0.45], [0.5, 0.3, 0.1, 0.1]], dtype=torch.float64)
    forward, reverse = oracles.forward_kl(np.log(p), np.log(q)), oracles.reverse_kl(np.log(p), np.log(q))
    # Head of the first row at 0.7: tokens 0 and 2 (0.3 + 0.3), with gaps 0.2 and 0.1; the tail's are 0.1 and 0.2.
    close(
        AdaptiveKL(0.7)(p.log(), q.log()), np.array([0.3, 0.4]) / np.array([0.6, 0.8]) * (forward - reverse) + reverse
    )
    student = p.log().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(AdaptiveKL()(p.log(), student).sum(), student)
    # Half of forward KL alone and half of reverse KL alone, with log Q free: −P/2 + Q/2.
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("divergence", "same"),
    [
        (SymmetricKL(1.0), ForwardKL()),
        (SymmetricKL(0.0), ReverseKL()),
        (SkewForwardKL(0.0), ForwardKL()),
        (SkewReverseKL(0.0), ReverseKL()),
        (AlphaBeta(1, 0), ForwardKL()),
        (AlphaBeta(0, 1), ReverseKL()),
    ],
)
def test_limits_that_are_another_divergence(divergence: Divergence, same: Divergence) -> None:
    for ours, theirs in zip(evaluate(divergence, *pair()), evaluate(same, *pair()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("powers", [(1, 0), (0, 1), (0, 0), (0.4, 0), (0, 1.7)], ids=str)
def test_limits_of_alpha_beta(powers: tuple[float, float]) -> None:
    """Each limit is what the formula goes to."""
    target, student = pair(1.0)
    near = [1e-4 if power == 0 else power for power in powers]
    formula = functools.partial(oracles.alpha_beta, alpha=near[0], beta=near[1])
    log_p, z = log_softmax(target.numpy()), student.detach().numpy()
    value_N, gradient = evaluate(AlphaBeta(*powers), target, student)
    close(value_N, formula(log_p, log_softmax(z)), rtol=2e-3, atol=0)
    close(gradient, numeric_gradient(lambda moved: formula(log_p, log_softmax(moved)), z, 1e-3), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("name", ["tvd", "jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_bounds(name: str) -> None:
    """Those that stay finite whatever the target rules out, and how far they can go."""
    target = torch.full((1, 3), -torch.inf, dtype=torch.float64)
    target[0, 0] = 0.0
    student = torch.tensor([[-800.0, 0.0, -900.0]], dtype=torch.float64, requires_grad=True)
    value_N, gradient = evaluate(CASES[name][0], target, student)
    # Disjoint supports: M = λP there, so the KL is −log λ.
    bound = {"tvd": 1.0, "jsd": np.log(2), "skew_forward_kl": np.log(10), "skew_reverse_kl": np.log(10)}[name]
    assert value_N.item() == pytest.approx(bound, rel=1e-9)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@ALL
def test_tokens_that_the_target_rules_out(divergence: Divergence, oracle: Oracle, dtype: torch.dtype) -> None:
    """Forward KL, those with a mixture and ``logit_mse`` are finite, with finite gradients; the others +inf.

    The first row rules out a token that the student gives mass, the second one that it gives next to none (e^−60).
    """
    ruled_out = -torch.inf
    target = torch.tensor([[1.1, 1.0, 0.9, 0.9, 0.9, 0.9, ruled_out]] * 2, dtype=dtype)
    student = torch.tensor([[0.5, 0.2, 0.1, 0.3, 0.0, 0.3, 1.0], [1.0, 1.1, 0.9, 0.9, 0.9, 0.9, -60.0]], dtype=dtype)
    value_N, gradient = evaluate(divergence, target, student.requires_grad_())
    infinite = {"reverse_kl", "symmetric_kl", "adaptive_kl", "todi"}
    if divergence.name in infinite or (isinstance(divergence, AlphaBeta) and divergence.alpha == 0):
        assert (value_N == torch.inf).all(), value_N
    else:
        assert torch.isfinite(value_N).all()
        assert torch.isfinite(gradient).all()


def test_logit_mse_is_over_the_possible_tokens() -> None:
    """Those that neither side rules out: value and gradient of NumPy's variance over them; 0 if there are none."""
    ruled_out = -np.inf
    target = np.array([[1.0, ruled_out, 0.3, -0.4, 2.0], [1.0, ruled_out, ruled_out, ruled_out, ruled_out]])
    student = np.array([[0.2, 0.9, ruled_out, 1.4, -1.0], [ruled_out, 0.0, 0.0, 0.0, 0.0]])
    z = torch.tensor(student, requires_grad=True)
    value_N, gradient = evaluate(LogitMSE(), torch.tensor(target), z)
    log_p = log_softmax(target)
    close(value_N, oracles.logit_mse(log_p, log_softmax(student)))
    assert value_N[1] == 0
    possible = np.isfinite(target) & np.isfinite(student)
    expected = np.zeros_like(student)
    numeric = numeric_gradient(lambda moved: oracles.logit_mse(log_p, log_softmax(moved)), student, 1e-6)
    expected[possible] = numeric[possible]
    close(gradient, expected, rtol=1e-6, atol=1e-8)


@functools.cache
def near(spread: float, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    """Float32 log-probs of a target and of students all but at it; logits have any constant a row."""
    generator = torch.Generator().manual_seed(0)
    target = spread * torch.randn(200_000 // vocabulary, vocabulary, generator=generator)
    target += 1000 * torch.rand(len(target), 1, generator=generator)
    students = [target + noise * torch.randn(target.shape, generator=generator) for noise in (0.0, 1e-7, 1e-5, 1e-3)]
    return [(target.log_softmax(-1), student.log_softmax(-1)) for student in students]


@pytest.mark.parametrize("vocabulary", [400, 5000, 32000])
@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0])
@ALL
def test_float32_is_not_negative_near_the_target(
    divergence: Divergence, oracle: Oracle, spread: float, vocabulary: int
) -> None:
    """At least −1e-6, where each of many terms rounds and log_softmax is off by a constant a row."""
    lowest = min(divergence(log_p, log_q).min().item() for log_p, log_q in near(spread, vocabulary))
    assert lowest >= -1e-6


@pytest.mark.parametrize(("alpha", "beta"), [(0.05, 0.05), (0.05, 0), (0, 0.05), (0.05, 0.95), (0.5, 0.5)])
def test_float32_of_alpha_beta_near_its_limits(alpha: float, beta: float) -> None:
    """The smallest powers that are allowed: still at least −1e-6 near the target, and exact away from it."""
    generator = torch.Generator().manual_seed(0)
    divergence = AlphaBeta(alpha, beta)
    target = 3 * torch.randn(8, 5000, generator=generator)
    for noise in (1e-5, 1e-3, 0.1):
        student = target + noise * torch.randn(8, 5000, generator=generator)
        exact_N = divergence(target.double().log_softmax(-1), student.double().log_softmax(-1))
        value_N = divergence(target.log_softmax(-1), student.log_softmax(-1))
        assert value_N.min() >= -1e-6, f"noise {noise}"
        torch.testing.assert_close(value_N.double(), exact_N, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SymmetricKL(1.5), r"loss\.divergence\.weight is 1\.5; it must be between 0 and 1"),
        (lambda: SymmetricKL(float("nan")), r"loss\.divergence\.weight is nan; it must be between 0 and 1"),
        (lambda: JensenShannon(0), r"loss\.divergence\.beta is 0; it must be above 0 and below 1.*loss=kd \(forward"),
        (lambda: JensenShannon(1), r"loss\.divergence\.beta is 1; .*loss=kd_reverse"),
        (lambda: SkewForwardKL(1), r"loss\.divergence\.skew is 1; it must be at least 0 .*below 1"),
        (lambda: SkewReverseKL(-0.1), r"loss\.divergence\.skew is -0\.1; it must be at least 0 .*below 1"),
        (lambda: AdaptiveKL(0), r"loss\.divergence\.head_mass is 0; it must be above 0 and below 1"),
        (lambda: AdaptiveKL(1), r"loss\.divergence\.head_mass is 1; it must be above 0 and below 1"),
        (lambda: AlphaBeta(0.01, 3), r"divergence\.alpha is 0\.01; .*0 \(the limit\).*; loss\.divergence\.beta is 3; "),
        (lambda: AlphaBeta(-1, 0), r"loss\.divergence\.alpha is -1; it must be 0 \(the limit\) or between 0\.05 and 2"),
    ],
)
def test_errors(make: Callable[[], Divergence], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
