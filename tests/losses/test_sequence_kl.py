"""Reverse KL of whole responses: by enumeration of all responses of a small model, and against NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from deltakd.kernels import chunked_loss
from deltakd.losses import SequenceReverseKL, teacher_target
from deltakd.losses.sequence_kl import sums_of_later
from deltakd.types import Head, TokenFacts
from tests.losses.by_name import loss_named

#: A language of three tokens, and responses of three.
V, T = 3, 3


def contexts() -> list[tuple[int, ...]]:
    """Everything that can stand before a token."""
    return [text for length in range(T) for text in itertools.product(range(V), repeat=length)]


def tables(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher for each context, [contexts, V]; the student's want gradients."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (1.5 * torch.randn(len(contexts()), V, generator=generator, dtype=torch.float64) for _ in "ab")
    return student.requires_grad_(), teacher


def kl_of_responses(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(π_θ ‖ teacher) over all V^T responses, with its graph."""
    place = {text: number for number, text in enumerate(contexts())}
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for response in itertools.product(range(V), repeat=T):
        steps = [(place[response[:t]], response[t]) for t in range(T)]
        of_q, of_p = (torch.stack([table[step] for step in steps]).sum() for table in (log_q, log_p))
        total = total + of_q.exp() * (of_q - of_p)
    return total


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_the_expected_gradient_is_that_of_the_kl_of_whole_responses(chunk_size: int) -> None:
    """Over all responses, each weighted by its probability: the sum over its tokens; not length-normalised."""
    student, teacher = tables(0)
    (expected,) = torch.autograd.grad(kl_of_responses(student, teacher), student)
    loss = loss_named("minillm", length_normalised=False)
    place = {text: number for number, text in enumerate(contexts())}
    log_q = student.detach().log_softmax(-1)
    eye = torch.eye(V, dtype=torch.float64)
    found = torch.zeros_like(student)
    value = torch.zeros((), dtype=torch.float64)
    for response in itertools.product(range(V), repeat=T):
        places = torch.tensor([place[response[:t]] for t in range(T)])
        labels = torch.tensor(response)
        probability = log_q[places, labels].sum().exp()
        leaf = student.detach()[places].requires_grad_()
        heads = {"student": Head(leaf, eye), "teacher": Head(teacher[places], eye)}
        facts = TokenFacts(rows=torch.zeros(T, dtype=torch.long))
        total, _ = chunked_loss(loss, heads, labels, chunk_size, facts=facts)
        (gradient,) = torch.autograd.grad(total, leaf)
        found.index_add_(0, places, probability * gradient)
        value += probability * total.detach()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(value, kl_of_responses(student, teacher).detach())


def test_later_rewards_against_numpy() -> None:
    rows = torch.tensor([0, 0, 0, 1, 4, 4, 4, 4])
    values = torch.randn(8, generator=torch.Generator().manual_seed(0))
    sums, counts = sums_of_later(values, rows)
    expected = [sum(values[j].item() for j in range(i + 1, 8) if rows[j] == rows[i]) for i in range(8)]
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert counts.tolist() == [2, 1, 0, 0, 3, 2, 1, 0]


def test_length_normalised_weights_are_means_of_later_rewards() -> None:
    loss = SequenceReverseKL(teacher_target())
    rows = TokenFacts(rows=torch.tensor([0, 0, 0, 2, 2]))
    weights = loss.sequence_weights(torch.tensor([1.0, 2.0, 4.0, 8.0, 9.0]), rows)
    assert weights.tolist() == [3.0, 4.0, 0.0, 9.0, 0.0]


def test_rows_do_not_touch_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = {role: torch.randn(9, 4, generator=generator, dtype=torch.float64) for role in ("student", "teacher")}
    weight = {role: torch.randn(7, 4, generator=generator, dtype=torch.float64) for role in hidden}
    labels = torch.randint(0, 7, (9,), generator=generator)
    rows = torch.tensor([0, 0, 0, 0, 2, 2, 2, 5, 5])
    loss = loss_named("minillm", reward_clip=2.0)

    def gradient(tokens: Tensor, chunk_size: int) -> Tensor:
        leaf = hidden["student"][tokens].requires_grad_()
        heads = {
            "student": Head(leaf, weight["student"]),
            "teacher": Head(hidden["teacher"][tokens], weight["teacher"]),
        }
        total, _ = chunked_loss(loss, heads, labels[tokens], chunk_size, facts=TokenFacts(rows=rows[tokens]))
        return torch.autograd.grad(total, leaf)[0]

    whole = gradient(torch.arange(9), 4)
    parts = [gradient((rows == row).nonzero().squeeze(1), 2) for row in (0, 2, 5)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_rows_have_to_be_known() -> None:
    head = Head(torch.zeros(2, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"SequenceReverseKL is a loss of whole sequences: give facts=TokenFacts"):
        chunked_loss(loss_named("minillm"), {"student": head, "teacher": head}, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("options", [{"ratio_clip": 1.0}, {"reward_clip": 0.0}, {"ce_weight": -1.0}])
def test_wrong_settings_are_named(options: dict[str, float]) -> None:
    with pytest.raises(Exception, match=rf"loss\.{next(iter(options))} is"):
        loss_named("minillm", **options)


def test_cross_entropy_alone_reads_no_teacher() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    head = Head(hidden, torch.randn(7, 5, generator=generator, dtype=torch.float64))
    labels = torch.tensor([0, 6, 3, 3])
    loss = loss_named("minillm", ce_weight=1.0)
    assert loss.requires == frozenset()
    total, parts = chunked_loss(loss, {"student": head}, labels, 3, facts=TokenFacts(rows=torch.tensor([0, 0, 1, 1])))
    expected = torch.nn.functional.cross_entropy(head.logits(), labels, reduction="sum")
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(parts["ce"], expected.detach())
    torch.testing.assert_close(*(torch.autograd.grad(value, hidden)[0] for value in (total, expected)))
