"""Half-precision products with float32 results, against float64. A CPU has none: it computes what a GPU's would be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deltakd.kernels import KernelOptions, chunked_loss
from deltakd.kernels.options import even_chunks
from deltakd.types import Head, Products
from deltakd.types import products as products_module
from deltakd.types.products import add_product, operands, split
from tests.losses.by_name import loss_named, variants

N, V, D = 24, 700, 64
ROLES = ("student", "teacher", "student_raw", "teacher_raw")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_module, "HALF_PRODUCT_DEVICES", frozenset({"cpu", "cuda"}))


def heads(dtype: torch.dtype, hidden: torch.dtype | None = None, softcap: float | None = None) -> dict[str, Head]:
    """Models that agree roughly, with logits of up to ±50; the same numbers in every precision up to its rounding."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common_h, common_w = draw(N, D), draw(V, D) * 1.9
    made = {}
    for role in ROLES:
        h, w = common_h + 0.2 * draw(N, D), common_w + 0.2 * draw(V, D)
        made[role] = Head(h.to(hidden or dtype), w.to(dtype), (0.5 * draw(V)).to(dtype), softcap, 0.8)
    student = made["student"]
    for tensor in (student.hidden, student.weight, student.bias):
        tensor.requires_grad_()
    return made


def in_float64(some: dict[str, Head]) -> dict[str, Head]:
    """The same heads to the bit, in float64."""
    return {
        role: replace(
            head,
            **{name: getattr(head, name).detach().double().requires_grad_() for name in ("hidden", "weight", "bias")},
        )
        for role, head in some.items()
    }


def labels() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def test_two_summands_hold_sixteen_bits() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-20, 20, 10_000)
    high, low = split(x)
    error = (x.double() - high.double() - low.double()).abs()
    assert (error <= 2.0**-17 * x.double().abs()).all()
    assert len(split(x.bfloat16())) == 1
    exact = x.clamp(-100, 100).half()
    assert torch.equal(sum(part.double() for part in split(exact)), exact.double())


@pytest.mark.parametrize(
    ("left", "right", "products", "tolerance"),
    [
        (torch.bfloat16, torch.bfloat16, Products.EXACT, 2.0**-22),
        (torch.float16, torch.float16, Products.EXACT, 2.0**-22),
        (torch.bfloat16, torch.float32, Products.SPLIT, 2.0**-17),
        (torch.float32, torch.float32, Products.SPLIT, 2.0**-16),
        (torch.float16, torch.float32, Products.SPLIT, 2.0**-16),
        (torch.float32, torch.float32, Products.EXACT, 2.0**-22),
        (torch.bfloat16, torch.bfloat16, Products.FLOAT32, 2.0**-22),
    ],
    ids=str,
)
def test_a_product_is_off_by_this_share_of_its_largest_terms(
    left: torch.dtype, right: torch.dtype, products: Products, tolerance: float, as_on_a_gpu: None
) -> None:
    """The share of Σ |a b|, the size of the terms, not of what is left when they cancel."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(t) for shape, t in (((40, 256), left), ((256, 50), right)))
    total = torch.full((40, 50), 3.0)
    add_product(total, *operands(a, b, products), alpha=0.5, beta=2.0)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert (((total.double() - 6.0) / 0.5 - exact).abs() / size).max() <= tolerance + 2.0**-20


@pytest.mark.parametrize(
    ("dtype", "hidden", "products"),
    [
        (torch.bfloat16, torch.bfloat16, Products.EXACT),
        (torch.float16, torch.float16, Products.EXACT),
        (torch.float32, torch.bfloat16, Products.SPLIT),
        (torch.float32, torch.float32, Products.SPLIT),
    ],
    ids=str,
)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("name", ["sft", "delta_kd", "delta_kd_reverse", "delta_gated", "kd_jsd"])
def test_losses_and_gradients_as_on_a_gpu(
    name: str, softcap: float | None, dtype: torch.dtype, hidden: torch.dtype, products: Products, as_on_a_gpu: None
) -> None:
    """|Δ loss| ≤ 1e-3 nats a token, and gradients to 1e-3 in the 2-norm (float32 heads: 1e-4)."""
    ours = heads(dtype, hidden, softcap)
    exact = in_float64(ours)
    assert max(float(head.logits().detach().abs().max()) for head in exact.values()) > (45 if softcap is None else 20)
    loss = loss_named(name)
    total, parts = chunked_loss(loss, ours, labels(), 10, options=KernelOptions(products=products))
    output = loss({role: head.logits() for role, head in exact.items()}, labels())
    expected = output.per_token.sum()
    assert abs(total.item() - expected.item()) <= 1e-3 * N
    for part, value_N in output.parts.items():
        assert abs(float(parts[part]) - value_N.detach().sum().item()) <= 1e-3 * N
    student = exact["student"]
    gradients = torch.autograd.grad(expected, (student.hidden, student.weight, student.bias))
    # Before autograd rounds them to the dtype of their tensors.
    for ours_sum, gradient in zip(total.grad_fn.grads.values(), gradients, strict=True):
        assert ours_sum.dtype == torch.float32
        assert relative(ours_sum, gradient) <= (1e-4 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("products", [Products.EXACT, Products.SPLIT], ids=str)
def test_log_probs_to_a_thousandth(products: Products, as_on_a_gpu: None) -> None:
    """At |z| up to 50, where rounding the logits themselves to bfloat16 would be off by a tenth."""
    for dtype in (torch.bfloat16, torch.float32):
        made = heads(dtype)
        exact = in_float64(made)
        for role, head in made.items():
            with torch.no_grad():
                log_p = replace(head, products=products).prepared().logits().log_softmax(-1)
                expected = exact[role].logits().log_softmax(-1)
            assert (log_p - expected).abs().max() <= 1e-3
            assert (exact[role].logits().bfloat16().double().log_softmax(-1) - expected).abs().max() > 0.05


def test_every_other_loss_as_on_a_gpu(as_on_a_gpu: None) -> None:
    for name in ("taid", "parallelogram", "kd_todi", "kd_plus_delta", "delta_multi_teacher"):
        for loss in variants(name):
            ours = heads(torch.float32)
            ours |= {"teacher_2": ours["teacher"], "teacher_raw_2": ours["teacher_raw"]}
            some = {role: ours[role] for role in {"student", *loss.requires}}
            total, _ = chunked_loss(loss, some, labels(), 10, options=KernelOptions(products=Products.SPLIT))
            exact = in_float64(some)
            expected = loss({role: head.logits() for role, head in exact.items()}, labels()).per_token.sum()
            (left,) = torch.autograd.grad(total, some["student"].weight)
            (right,) = torch.autograd.grad(expected, exact["student"].weight)
            assert relative(left, right) <= 1e-4


def test_hidden_states_of_a_frozen_head_as_on_a_gpu(as_on_a_gpu: None) -> None:
    """As in LoRA: no gradient of the weight is made."""
    ours = heads(torch.bfloat16)
    student = ours["student"]
    ours["student"] = replace(student, weight=student.weight.detach(), bias=None)
    total, _ = chunked_loss(loss_named("delta_kd"), ours, labels(), 10)
    (ours_grad,) = total.grad_fn.grads.values()
    exact = in_float64({**ours, "student": replace(ours["student"], bias=torch.zeros(V))})
    expected = loss_named("delta_kd")({role: head.logits() for role, head in exact.items()}, labels()).per_token.sum()
    (exact_grad,) = torch.autograd.grad(expected, exact["student"].hidden)
    assert relative(ours_grad, exact_grad) <= 1e-3


@pytest.mark.parametrize("products", list(Products), ids=str)
def test_a_cpu_multiplies_in_float32_whatever_is_asked_for(products: Products) -> None:
    results = []
    for options in (KernelOptions(products=products), KernelOptions(products=Products.FLOAT32)):
        ours = heads(torch.bfloat16, torch.float32)
        total, _ = chunked_loss(loss_named("delta_kd"), ours, labels(), 10, options=options)
        results.append((total, *torch.autograd.grad(total, (ours["student"].hidden, ours["student"].weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert KernelOptions(products=products).record(torch.device("cpu"))["products"] == "float32"


def test_logits_with_a_graph_are_differentiable_as_on_a_gpu(as_on_a_gpu: None) -> None:
    head = heads(torch.bfloat16)["student"]
    head.logits().sum().backward()
    assert head.weight.grad is not None


@pytest.mark.parametrize(
    ("tokens", "affordable", "expected"),
    [
        (8192, 1150, 1024),
        (8192, 100_000, 4096),
        (1000, 5000, 4224),
        (5000, 4000, 2560),
        (8192, 100, 100),
        (8192, 1, 32),
    ],
)
def test_chunks_of_a_gpu_are_of_nearly_equal_size_in_whole_tiles(tokens: int, affordable: int, expected: int) -> None:
    assert even_chunks(tokens, affordable, 132 * 32) == expected
