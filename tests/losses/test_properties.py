"""Every loss by name on whatever models may say: always finite, or infinite where its definition is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltakd.types import Loss
from tests.losses.by_name import DISTILLING, NAMES, loss_named
from tests.losses.oracles import ROLES

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: With a reverse KL, or a plain difference of logits, in it: +inf where the target rules out what the student does not.
MAY_BE_INFINITE = {"kd_reverse", "delta_kd_reverse", "kd_symmetric", "kd_adaptive", "kd_todi"}
#: Finite whatever the student rules out: mixtures, bounded distances, and those over the possible tokens.
ALWAYS_FINITE = {"kd_jsd", "kd_skew", "delta_kd_skew", "kd_tvd", "kd_logit_mse"} | {
    "parallel_cross",
    "parallel_logit",
    "parallel_ratio",
}
N = 3
ONCE = settings(deadline=None, max_examples=20, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink])


def draw(seed: int, v: int, scale: float, ruled_out: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Logits in ±scale, with −inf: none, columns of one reference, scattered in all, or in the student; not token 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = {role: scale * (2 * torch.rand(N, v, generator=generator, dtype=torch.float64) - 1) for role in ROLES}
    for number, role in enumerate(ROLES[1:]):
        if ruled_out == "columns" and number == seed % 5:
            logits[role][:, 1 + torch.randperm(v - 1, generator=generator)[: 1 + v // 10]] = -math.inf
        elif ruled_out == "scattered":
            where = torch.rand(N, v, generator=generator) < 0.2
            where[:, 0] = False
            logits[role][where] = -math.inf
    if ruled_out == "student":
        logits["student"][:, 1 + torch.randperm(v - 1, generator=generator)[: 1 + v // 10]] = -math.inf
    logits = {role: z.to(dtype) for role, z in logits.items()}
    return logits, torch.randint(0, v, (N,), generator=generator)


def check(loss: Loss, name: str, logits: dict[str, Tensor], labels: Tensor, may_be_infinite: bool) -> None:
    logits["student"] = logits["student"].detach().requires_grad_()
    output = loss(logits, labels)
    expected = torch.float64 if logits["student"].dtype == torch.float64 else torch.float32
    assert output.per_token.dtype == expected
    finite = torch.isfinite(output.per_token)
    assert finite.all() or (may_be_infinite and (output.per_token[~finite] == math.inf).all()), output.per_token
    if finite.any():
        (gradient,) = torch.autograd.grad(output.per_token[finite].sum(), logits["student"])
        # Of an infinite token the gradient is NaN whatever weight it has; training has stopped there.
        assert torch.isfinite(gradient[finite]).all()
    for part, value_N in output.parts.items():
        assert value_N.min() >= -1e-6, f"{part} is {value_N.min().item()}"


@pytest.mark.parametrize("name", NAMES)
@ONCE
@given(
    v=st.sampled_from([2, 3, 17, 400, 5000]),
    tau=st.floats(0.1, 100),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0, 300.0, 1e4]),
    ruled_out=st.sampled_from(["nothing", "columns", "scattered"]),
    dtype=st.sampled_from(DTYPES),
    delta_weight=st.sampled_from([0.7, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_always_finite_and_never_negative(
    name: str,
    v: int,
    tau: float,
    scale: float,
    ruled_out: str,
    dtype: torch.dtype,
    delta_weight: float,
    seed: int,
) -> None:
    options = {} if name == "sft" else {"temperature": tau}
    loss = loss_named(name, delta_weight=delta_weight, **options)
    logits, labels = draw(seed, v, scale, ruled_out, dtype)
    check(loss, name, logits, labels, name in MAY_BE_INFINITE and ruled_out != "nothing")


@pytest.mark.parametrize("name", NAMES)
@ONCE
@given(
    v=st.sampled_from([2, 17, 400]),
    tau=st.sampled_from([0.5, 1.0, 2.0]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_a_student_that_rules_tokens_out(
    name: str, v: int, tau: float, scale: float, dtype: torch.dtype, seed: int
) -> None:
    """+inf where the definition is, and never NaN; labels are possible."""
    options = {} if name == "sft" else {"temperature": tau}
    loss = loss_named(name, delta_weight=0.7, **options)
    logits, _ = draw(seed, v, scale, "student", dtype)
    check(loss, name, logits, torch.zeros(N, dtype=torch.int64), name not in ALWAYS_FINITE)


@pytest.mark.parametrize("name", [name for name in DISTILLING if hasattr(loss_named(name), "target")])
@ONCE
@given(
    v=st.sampled_from([2, 17, 5000]),
    tau=st.floats(0.1, 100),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4]),
    noise=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_near_the_target(
    name: str, v: int, tau: float, scale: float, noise: float, dtype: torch.dtype, seed: int
) -> None:
    """Where rounding decides: the student is all but at the target, in float32 at least."""
    loss = loss_named(name, delta_weight=0.7, temperature=tau)
    logits, labels = draw(seed, v, scale, "nothing", dtype)
    met = logits["teacher"] if name == "taid" else loss.target(logits)
    generator = torch.Generator().manual_seed(seed)
    logits["student"] = met + noise * torch.randn(met.shape, generator=generator, dtype=torch.float64).to(met.dtype)
    check(loss, name, logits, labels, may_be_infinite=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_types_are_read_in_float32(name: str, dtype: torch.dtype) -> None:
    """The value is that of the same numbers in float64, to the rounding of float32; the gradient has their dtype."""
    logits, labels = draw(0, 400, 5.0, "nothing", dtype)
    logits["student"].requires_grad_()
    exact = {role: z.detach().double().requires_grad_(role == "student") for role, z in logits.items()}
    loss = loss_named(name, delta_weight=0.7)
    value_N, exact_N = (loss(z, labels).per_token for z in (logits, exact))
    torch.testing.assert_close(value_N.double(), exact_N, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(value_N.sum(), logits["student"])
    (exact_gradient,) = torch.autograd.grad(exact_N.sum(), exact["student"])
    assert gradient.dtype == dtype
    rounding = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-4)
    assert (gradient.double() - exact_gradient).abs().max() <= rounding * exact_gradient.abs().max()
