"""The chunked path against the plain one: all logits at once, plain autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deltakd.kernels import chunked_loss
from deltakd.kernels.blocks import BLOCK_BYTES
from deltakd.losses import Distillation, ForwardKL, SupervisedFineTuning, delta_target
from deltakd.types import Head, HeadLogits, Loss
from tests.losses.by_name import NAMES, loss_named, variants

N, V = 13, 37
LOSSES = {"sft": SupervisedFineTuning(), "delta_kd": Distillation(delta_target(0.7), ForwardKL(), 1.5, 0.3)}


def make_heads(dtype: torch.dtype, **options: Any) -> dict[str, Head]:
    generator = torch.Generator().manual_seed(0)

    def head(width: int, trained: bool) -> Head:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(trained)

        return Head(
            draw(N, width),
            draw(V, width),
            draw(V) if options.get("biased") else None,
            options.get("softcap"),
            options.get("scale", 1.0),
        )

    widths = {"student": 6, "teacher": 11, "teacher_raw": 11, "student_raw": 6, "teacher_2": 5, "teacher_raw_2": 5}
    return {role: head(width, role == "student") for role, width in widths.items()}


def labels() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


def plain(loss: Loss, heads: dict[str, Head], labels_N: Tensor) -> Tensor:
    return loss({role: head.logits() for role, head in heads.items()}, labels_N).per_token.sum()


def gradients(total: Tensor, head: Head) -> list[Tensor]:
    return list(torch.autograd.grad(total, [t for t in (head.hidden, head.weight, head.bias) if t is not None]))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("tau", "ce_weight"), [(1.0, 0.0), (1.0, 0.3), (2.0, 0.0), (2.0, 0.3), (1.0, 1.0)])
def test_by_hand_in_blocks_of_rows(tau: float, ce_weight: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK_BYTES, "cpu", rows * V * 8)
    loss, heads = Distillation(delta_target(0.7), ForwardKL(), tau, ce_weight), make_heads(torch.float64)
    total, parts = chunked_loss(loss, heads, labels(), 10)
    expected = plain(loss, heads, labels())
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients(total, heads["student"]), gradients(expected, heads["student"]))
    output = loss({role: head.logits() for role, head in heads.items()}, labels())
    assert parts.keys() == output.parts.keys()
    for name, value_N in output.parts.items():
        torch.testing.assert_close(parts[name], value_N.detach().sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("options", [{}, {"biased": True}, {"softcap": 5.0, "scale": 0.3}], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 5, 13, 100, None])
def test_values_and_gradients(name: str, options: dict[str, Any], chunk_size: int | None) -> None:
    loss, heads = LOSSES[name], make_heads(torch.float64, **options)
    total, parts = chunked_loss(loss, heads, labels(), chunk_size)
    expected = plain(loss, heads, labels())
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)
    actual = gradients(3 * total, heads["student"])
    for ours, theirs in zip(actual, gradients(3 * expected, heads["student"]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    output = loss({role: head.logits() for role, head in heads.items()}, labels())
    for part, value_N in output.parts.items():
        torch.testing.assert_close(parts[part], value_N.sum().detach(), rtol=1e-10, atol=0)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Relative to the largest element: small ones are what is left of large ones that cancel."""
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("options", [{"biased": True}, {"softcap": 5.0, "scale": 0.3}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_by_name(name: str, dtype: torch.dtype, tolerance: float, options: dict[str, Any]) -> None:
    """Value, parts, and gradients of hidden states, weight and bias are those of all logits at once."""
    heads = make_heads(dtype, **options)
    for loss in variants(name):
        total, parts = chunked_loss(loss, {role: heads[role] for role in {"student", *loss.requires}}, labels(), 5)
        output = loss({role: head.logits() for role, head in heads.items()}, labels())
        expected = output.per_token.sum()
        assert_near(total.detach(), expected.detach(), tolerance)
        assert set(parts) == set(output.parts)
        for part, value_N in output.parts.items():
            assert_near(parts[part], value_N.sum().detach(), tolerance)
        actual = gradients(total, heads["student"])
        for ours, theirs in zip(actual, gradients(expected, heads["student"]), strict=True):
            assert_near(ours, theirs, tolerance)


@pytest.mark.parametrize(
    "name", ["kd_reverse", "delta_kd_reverse", "delta_gated", "kd_jsd", "delta_kd_skew", "kd_skew_reverse"]
)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.7, "ce_weight": 0.0}], ids=str)
def test_a_gradient_by_hand_against_differences(name: str, options: dict[str, Any]) -> None:
    """Central differences of the summed loss w.r.t. single hidden states and weights, in float64."""
    loss, heads = loss_named(name, delta_weight=0.7, **options), make_heads(torch.float64)
    student = heads["student"]
    assert loss.fused_form is not None
    total, _ = chunked_loss(loss, heads, labels(), 5)
    for tensor, gradient in zip((student.hidden, student.weight), gradients(total, student), strict=False):
        flat = tensor.detach().view(-1)
        for at in range(0, len(flat), 7):
            sides = []
            for step in (1e-5, -1e-5):
                flat[at] += step
                sides.append(plain(loss, heads, labels()).item())
                flat[at] -= step
            assert gradient.view(-1)[at].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-7)


def numpy_logits(head: Head) -> np.ndarray:
    """softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap), in float64."""
    hidden, weight = (t.detach().double().numpy() for t in (head.hidden, head.weight))
    z = hidden @ weight.T + (0.0 if head.bias is None else head.bias.detach().double().numpy())
    z = z * head.scale
    return z if head.softcap is None else head.softcap * np.tanh(z / head.softcap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"biased": True}, {"scale": 0.25, "biased": True}, {"softcap": 5.0}, {"softcap": 5.0, "scale": 0.3}],
    ids=str,
)
def test_sums_of_heads(options: dict[str, Any], dtype: torch.dtype) -> None:
    """``combined`` is the plain sum, whichever logits exist already, and it changes none of them."""
    heads = make_heads(dtype, **options)
    # One that is linear beside one that is not.
    heads["teacher_2"] = Head(heads["teacher_2"].hidden, heads["teacher_2"].weight)
    exact = {role: numpy_logits(head) for role, head in heads.items()}
    references = {role: head for role, head in heads.items() if role != "student"}
    for coefficients in (
        {"teacher": 1.0},
        {"student_raw": -0.4},
        {"teacher": 1.0, "student_raw": 0.7, "teacher_raw": -0.7},
        {"teacher": 0.4, "student": 0.6},
        {"student_raw": 1.0, "teacher": 0.3, "teacher_raw": -0.3, "teacher_2": 2.0, "teacher_raw_2": -2.0},
    ):
        expected = sum(factor * exact[role] for role, factor in coefficients.items())
        for read_before in ((), ("teacher_raw",), tuple(references)):
            student = heads["student"].logits()
            logits = HeadLogits(student, references)
            before = {role: logits[role].clone() for role in ("student", *read_before)}
            total = logits.combined(coefficients)
            assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert not total.requires_grad
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            np.testing.assert_allclose(total.numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())
            assert all(torch.equal(logits[role], z) for role, z in before.items())
            assert logits["student"] is student


def test_a_token_that_a_bias_rules_out() -> None:
    """−inf in the heads of references has no target mass, here as in the plain path: no NaN from −inf + inf."""
    heads = make_heads(torch.float64, biased=True)
    for role in ("teacher", "teacher_raw"):
        heads[role].bias[3] = -torch.inf
    total, _ = chunked_loss(LOSSES["delta_kd"], heads, labels(), 5)
    torch.testing.assert_close(total, plain(LOSSES["delta_kd"], heads, labels()))


def test_logits_by_role_are_a_mapping() -> None:
    heads = make_heads(torch.float64)
    references = {role: head for role, head in heads.items() if role != "student"}
    logits = HeadLogits(heads["student"].logits(), references)
    assert set(logits) == set(heads)
    assert len(logits) == len(heads)
    for role, head in heads.items():
        np.testing.assert_allclose(logits[role].detach().numpy(), numpy_logits(head), rtol=1e-12, atol=1e-12)
    assert not logits["teacher"].requires_grad
    assert logits["student"].requires_grad


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_come_in_the_dtype_of_the_head(dtype: torch.dtype, rtol: float) -> None:
    heads = make_heads(dtype)
    total, _ = chunked_loss(LOSSES["delta_kd"], heads, labels(), 4)
    expected = plain(LOSSES["delta_kd"], heads, labels())
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients(total, heads["student"]), gradients(expected, heads["student"]), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


def test_autocast_does_not_reach_the_logits() -> None:
    heads = make_heads(torch.float32)
    expected, _ = chunked_loss(LOSSES["delta_kd"], heads, labels(), 4)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = chunked_loss(LOSSES["delta_kd"], heads, labels(), 4)
    assert torch.equal(total, expected)


def test_no_tensor_of_n_times_v_is_made() -> None:
    """The largest tensor that a loss sees has chunk_size rows."""
    seen: list[int] = []

    class Spy(Loss):
        requires = LOSSES["delta_kd"].requires

        def __call__(self, logits: dict[str, Tensor], labels: Tensor) -> Any:
            seen.extend(len(z) for z in logits.values())
            return LOSSES["delta_kd"](logits, labels)

    chunked_loss(Spy(), make_heads(torch.float32), labels(), 4)[0].backward()
    assert max(seen) == 4


def test_no_gradients_without_grad_mode() -> None:
    heads = make_heads(torch.float64)
    with torch.no_grad():
        total, _ = chunked_loss(LOSSES["delta_kd"], heads, labels(), 4)
    assert not total.requires_grad
    torch.testing.assert_close(total, plain(LOSSES["delta_kd"], heads, labels()).detach())


def test_frozen_head_under_a_trained_body() -> None:
    heads = make_heads(torch.float64)
    student = heads["student"]
    heads["student"] = Head(student.hidden, student.weight.detach())
    total, _ = chunked_loss(LOSSES["delta_kd"], heads, labels(), 4)
    (ours,) = torch.autograd.grad(total, student.hidden)
    (theirs,) = torch.autograd.grad(plain(LOSSES["delta_kd"], heads, labels()), student.hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_identity_15_no_valid_token_is_a_zero_on_the_graph() -> None:
    heads = {role: Head(head.hidden[:0], head.weight) for role, head in make_heads(torch.float32).items()}
    total, _ = chunked_loss(LOSSES["delta_kd"], heads, labels()[:0])
    assert total.item() == 0
    grads = torch.autograd.grad(total, [heads["student"].weight])
    assert torch.equal(grads[0], torch.zeros_like(grads[0]))


def test_without_a_valid_token_every_trained_tensor_gets_a_zero() -> None:
    """The bias too: a trained tensor without a gradient on one rank is one that the others wait for."""
    student = make_heads(torch.float32, biased=True)["student"]
    total, _ = chunked_loss(
        SupervisedFineTuning(), {"student": Head(student.hidden[:0], student.weight, student.bias)}, labels()[:0]
    )
    total.backward()
    for trained in (student.weight, student.bias):
        assert trained.grad is not None
        assert torch.equal(trained.grad, torch.zeros_like(trained))


def test_errors() -> None:
    heads = make_heads(torch.float32)
    with pytest.raises(ValueError, match=r"needs heads for \['teacher_raw'\]"):
        chunked_loss(LOSSES["delta_kd"], {k: v for k, v in heads.items() if k != "teacher_raw"}, labels())
    short = heads | {"teacher": Head(heads["teacher"].hidden, heads["teacher"].weight[:-1])}
    with pytest.raises(ValueError, match=r"heads must agree in \(tokens, vocabulary\)"):
        chunked_loss(LOSSES["delta_kd"], short, labels())
    with pytest.raises(ValueError, match=r"heads must agree .* have 12 tokens; given: .*'teacher': \(13, 37\)"):
        chunked_loss(LOSSES["delta_kd"], heads, labels()[:-1])
    for size in (-1, 0):
        with pytest.raises(ValueError, match=rf"chunk_size is {size}; it must be at least 1, or None"):
            chunked_loss(LOSSES["delta_kd"], heads, labels(), size)
