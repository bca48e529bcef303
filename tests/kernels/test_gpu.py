"""The Triton kernels against the plain losses: on a GPU if there is one, else by Triton's interpreter.

``make test-kernels`` installs Triton and sets ``TRITON_INTERPRET=1``, which Triton reads when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and no TRITON_INTERPRET=1: see `make test-kernels`", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: see `make test-kernels`")

from deltakd.kernels import KernelOptions, chunked_loss  # noqa: E402
from deltakd.losses.divergences import Divergence, JensenShannon, SkewForwardKL, SkewReverseKL  # noqa: E402
from deltakd.references.topk import make_buckets  # noqa: E402
from deltakd.types import (  # noqa: E402
    Head,
    LinearKL,
    Loss,
    Products,
    triton_devices,
)
from deltakd.types import products as products_module  # noqa: E402
from tests.losses.by_name import loss_named  # noqa: E402

# A GPU computes −inf − (−inf) in silence, and a kernel discards it; NumPy, the interpreter's arithmetic, warns.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")

ROLES = ("student", "teacher", "student_raw", "teacher_raw")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_devices, "DEVICES", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(products_module, "HALF_PRODUCT_DEVICES", frozenset({"cpu", "cuda"}))


def heads(n: int, v: int, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Head]:
    generator = torch.Generator().manual_seed(n + v)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    made = {
        role: Head(
            draw(n, 8),
            draw(v, 8),
            draw(v) if options.get("biased") else None,
            options.get("softcap"),
            options.get("scale", 1.0),
        )
        for role in ROLES
    }
    student = made["student"]
    for tensor in (student.hidden, student.weight, student.bias):
        if tensor is not None:
            tensor.requires_grad_()
    return made


def labels(n: int, v: int) -> Tensor:
    return torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def in_float64(some: Mapping[str, Head]) -> dict[str, Head]:
    def exact(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

    return {
        role: replace(head, hidden=exact(head.hidden), weight=exact(head.weight), bias=exact(head.bias))
        for role, head in some.items()
    }


def trained(head: Head) -> list[Tensor]:
    return [t for t in (head.hidden, head.weight, head.bias) if t is not None and t.requires_grad]


def compare(
    loss: Loss, some: dict[str, Head], at: Tensor, products: Products = Products.FLOAT32, tolerance: float = 2e-5
) -> None:
    """Value, parts and gradients are those of the plain loss in float64."""
    some = {role: some[role] for role in ("student", *sorted(loss.requires))}
    total, parts = chunked_loss(loss, some, at, 5, options=KernelOptions(products=products))
    exact = in_float64(some)
    output = loss({role: head.logits() for role, head in exact.items()}, at)
    expected = output.per_token.sum()
    assert set(parts) == set(output.parts)
    for name, value_N in output.parts.items():
        value = value_N.detach().sum().item()
        assert parts[name].item() == pytest.approx(value, rel=tolerance, abs=tolerance * len(at))
    assert total.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance * len(at))
    found = dict(total.grad_fn.grads)
    for ours, theirs in zip(found.values(), torch.autograd.grad(expected, trained(exact["student"])), strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    with torch.no_grad():
        value, _ = chunked_loss(loss, some, at, 5, options=KernelOptions(products=products))
    assert value.item() == pytest.approx(total.item(), rel=1e-6)


OPTIONS = [
    {},
    {"temperature": 1.7, "ce_weight": 0.0},
    {"temperature": 0.6, "ce_weight": 0.3, "temperature_squared": True},
    {"ce_weight": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["delta_kd", "delta_kd_reverse", "delta_gated"])
def test_losses_of_a_linear_target(name: str, options: dict[str, Any]) -> None:
    compare(loss_named(name, **options), heads(7, 37), labels(7, 37))


DIVERGENCES = [JensenShannon(0.5), JensenShannon(0.1), SkewForwardKL(0.1), SkewReverseKL(0.3)]


@pytest.mark.parametrize("options", OPTIONS[1:3], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.name)
@pytest.mark.parametrize("name", ["delta_kd", "delta_gated"])
def test_kls_to_a_mixture_of_both(name: str, divergence: Divergence, options: dict[str, Any]) -> None:
    """Where P and Q hardly overlap the gradient is a small difference, and float32 logits are what limits it."""
    loss = loss_named(name, **options)
    loss.divergence = divergence
    assert loss.fused_form.mixture is not None
    for v in (2, 37, 4097):
        compare(loss, heads(5, v), labels(5, v), tolerance=1e-4)
    compare(loss, heads(5, 37, softcap=5.0, scale=0.7, biased=True), labels(5, 37), tolerance=1e-4)
    compare(loss, heads(5, 37, torch.bfloat16), labels(5, 37), Products.EXACT, tolerance=1e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.name)
def test_a_mixture_with_tokens_that_one_side_rules_out(divergence: Divergence) -> None:
    loss = loss_named("kd", ce_weight=0.0)
    loss.divergence = divergence
    some, at = heads(6, 40, biased=True), labels(6, 40).clamp(min=20)
    with torch.no_grad():
        some["teacher"].bias[:9] = -torch.inf
        some["student"].bias[5:15] = -torch.inf
    compare(loss, some, at, tolerance=1e-4)


@pytest.mark.parametrize("name", ["sft", "kd", "kd_reverse", "delta_gated"])
@pytest.mark.parametrize(
    "options",
    [{"biased": True}, {"scale": 0.3, "biased": True}, {"softcap": 5.0}, {"softcap": 5.0, "scale": 0.3}],
    ids=str,
)
def test_heads_with_a_bias_a_scale_or_a_cap(name: str, options: dict[str, Any]) -> None:
    compare(loss_named(name), heads(6, 50, **options), labels(6, 50))


@pytest.mark.parametrize("v", [2, 3, 127, 4096, 4097, 151_936])
@pytest.mark.parametrize("name", ["delta_kd", "kd_reverse"])
def test_vocabularies_of_any_size(name: str, v: int) -> None:
    rows = 7 if v < 200 else 2
    # Of 151,936 terms, the float32 products of a CPU lose this much, with any loss.
    tolerance = 1e-4 if v > 10_000 else 2e-5
    compare(loss_named(name, temperature=1.3), heads(rows, v), labels(rows, v), tolerance=tolerance)


@pytest.mark.parametrize(
    ("dtype", "products", "tolerance"),
    [
        (torch.bfloat16, Products.EXACT, 1e-3),
        (torch.float16, Products.EXACT, 1e-3),
        (torch.float32, Products.SPLIT, 1e-4),
        (torch.float32, Products.EXACT, 2e-5),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["sft", "delta_kd", "kd_reverse", "delta_gated"])
def test_gradients_as_operands_of_the_next_products(
    name: str, dtype: torch.dtype, products: Products, tolerance: float
) -> None:
    compare(loss_named(name), heads(6, 301, dtype, softcap=20.0), labels(6, 301), products, tolerance)


@pytest.mark.parametrize("name", ["delta_kd", "delta_gated"])
def test_tokens_that_references_rule_out(name: str) -> None:
    some = heads(6, 50, biased=True)
    for role, tokens in (("teacher", [3, 4]), ("teacher_raw", [3, 7]), ("student_raw", [9])):
        some[role].bias[tokens] = -torch.inf
    at = labels(6, 50)
    compare(loss_named(name), some, at)


def test_a_token_that_all_models_rule_out() -> None:
    some = heads(6, 50, biased=True)
    some = {role: replace(head, bias=head.bias.detach().clone()) for role, head in some.items()}
    for head in some.values():
        head.bias[11] = -torch.inf
    at = labels(6, 50).clamp(max=10)
    for name in ("kd", "kd_reverse"):
        compare(loss_named(name), some, at)


def test_reverse_kl_is_infinite_where_the_target_rules_a_token_out() -> None:
    some = heads(3, 20, biased=True)
    some["teacher"].bias[4] = -torch.inf
    total, _ = chunked_loss(loss_named("kd_reverse"), some, labels(3, 20))
    assert total.item() == float("inf")


def test_no_tokens() -> None:
    total, parts = chunked_loss(loss_named("delta_kd"), heads(0, 9), labels(0, 9))
    assert total.item() == 0
    assert parts == {}
    from deltakd.kernels.gpu import linear_kl

    empty = torch.empty(0, 9, device=DEVICE)
    ce_N, kl_N = linear_kl.loss_rows(LinearKL({}, 1.0, 0.5), empty, empty, labels(0, 9), (empty,))
    assert len(ce_N) == len(kl_N) == len(linear_kl.gate_rows(empty, empty, 1.0)) == 0


def test_logits_of_fifty_and_equal_models() -> None:
    """Where models agree the divergence is 0, not what is left of logits that cancel."""
    some = heads(5, 400)
    weight = some["student"].weight.detach() * 9
    teacher = Head(some["student"].hidden.detach(), weight)
    student = Head(teacher.hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    assert teacher.logits().abs().max() > 50
    for name in ("kd", "kd_reverse"):
        total, parts = chunked_loss(
            loss_named(name, ce_weight=0.0), {"student": student, "teacher": teacher}, labels(5, 400)
        )
        assert abs(total.item()) < 1e-5
        assert total.grad_fn.grads["hidden"].abs().max() < 1e-4
        assert parts["ce"] > 0


def test_the_kernels_are_used_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltakd.kernels.gpu import linear_kl

    calls: list[int] = []
    plain = linear_kl.loss_rows
    monkeypatch.setattr(linear_kl, "loss_rows", lambda *args: calls.append(len(args[1])) or plain(*args))
    some, at = heads(6, 40), labels(6, 40)
    on, _ = chunked_loss(loss_named("delta_kd"), some, at, 4)
    assert calls == [4, 2]
    off, _ = chunked_loss(loss_named("delta_kd"), some, at, 4, options=KernelOptions(triton=False))
    assert calls == [4, 2]
    assert on.item() == pytest.approx(off.item(), rel=1e-6)
    # Float64 has no kernels, nor has a loss without a fused form.
    chunked_loss(loss_named("delta_kd"), in_float64(some), at)
    chunked_loss(loss_named("kd_tvd"), some, at)
    assert calls == [4, 2]
    record = KernelOptions().record(torch.device(DEVICE))
    assert record["triton"] is True


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)], ids=str
)
@pytest.mark.parametrize("k", [5, 30])
@pytest.mark.parametrize("name", ["delta_kd", "kd_reverse", "sft", "kd_jsd"])
def test_references_of_top_k_log_probs(
    name: str, k: int, dtype: torch.dtype, tolerance: float, options: dict[str, Any]
) -> None:
    """Against the plain path over the same buckets, in float64; at k = 30 the support is the whole vocabulary."""
    loss = loss_named(name, temperature=1.4, ce_weight=0.3) if name != "sft" else loss_named(name)
    some, at = heads(6, 30, dtype, **options), labels(6, 30)
    student = some["student"]
    exact = in_float64({"student": student})["student"]
    references = {role: some[role] for role in sorted(loss.requires)}
    buckets = make_buckets(references or {"teacher": some["teacher"]}, at, k, 1.4 if references else 1.0)
    expected, _ = chunked_loss(loss, {"student": exact}, at, 4, buckets.cast(torch.float64))
    total, _ = chunked_loss(loss, {"student": student}, at, 4, buckets)
    assert total.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in zip(total.grad_fn.grads.values(), expected.grad_fn.grads.values(), strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    with torch.no_grad():
        value, _ = chunked_loss(loss, {"student": student}, at, 4, buckets)
    assert value.item() == pytest.approx(total.item(), rel=1e-6)


def test_rows_may_lie_close_together_or_far_apart() -> None:
    """What lies beyond the end of a row is never used, and what is not the row's padding never written."""
    from deltakd.kernels.gpu import linear_kl

    n, v = 3, 37
    generator = torch.Generator().manual_seed(0)
    z, target = (torch.randn(n, v, generator=generator).to(DEVICE) for _ in range(2))
    results = []
    for pitch in (v, 40, 48, 64):
        wide = torch.full((3, n, pitch), torch.nan, device=DEVICE)
        wide[0, :, :v], wide[1, :, :v] = z, target
        form = LinearKL({"teacher": 1.0}, 1.3, 0.4)
        ce_N, kl_N = linear_kl.loss_rows(form, wide[0, :, :v], wide[1, :, :v], labels(n, v), (wide[2, :, :v],))
        assert torch.equal(wide[0, :, :v], z)
        results.append((ce_N, kl_N, wide[2, :, :v].clone()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not any(tensor.isnan().any() for tensor in results[0])
