"""The chunked path against the plain one: all logits at once, plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltakd.kernels import chunked_loss
from deltakd.losses import DeltaTarget, Distillation, ForwardKL, SupervisedFineTuning
from deltakd.types import Head, Loss

N, V = 13, 37
LOSSES = {"sft": SupervisedFineTuning(), "delta_kd": Distillation(DeltaTarget(0.7), ForwardKL(), 1.5, 0.3)}


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

    widths = {"student": 6, "teacher": 11, "teacher_raw": 11, "student_raw": 6}
    return {role: head(width, role == "student") for role, width in widths.items()}


def labels() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


def plain(loss: Loss, heads: dict[str, Head], labels_N: Tensor) -> Tensor:
    return loss({role: head.logits() for role, head in heads.items()}, labels_N).per_token.sum()


def gradients(total: Tensor, head: Head) -> list[Tensor]:
    return list(torch.autograd.grad(total, [t for t in (head.hidden, head.weight, head.bias) if t is not None]))


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

    class Spy:
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


def test_identity_13_padded_vocabulary_rows_change_nothing() -> None:
    heads = make_heads(torch.float64)
    padded = {
        role: Head(h.hidden, torch.cat([h.weight, 100 * torch.randn(5, h.weight.shape[1], dtype=torch.float64)])[:V])
        for role, h in heads.items()
    }
    first, _ = chunked_loss(LOSSES["delta_kd"], heads, labels(), 4)
    assert torch.equal(first, chunked_loss(LOSSES["delta_kd"], padded, labels(), 4)[0])


def test_errors() -> None:
    heads = make_heads(torch.float32)
    with pytest.raises(ValueError, match=r"needs heads for \['teacher_raw'\]"):
        chunked_loss(LOSSES["delta_kd"], {k: v for k, v in heads.items() if k != "teacher_raw"}, labels())
    short = heads | {"teacher": Head(heads["teacher"].hidden, heads["teacher"].weight[:-1])}
    with pytest.raises(ValueError, match=r"heads must agree in \(tokens, vocabulary\)"):
        chunked_loss(LOSSES["delta_kd"], short, labels())
