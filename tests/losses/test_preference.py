"""The preference of the data's response over the student's: NumPy, the authors' formula, chunks, the step's means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltakd.kernels import chunked_loss
from deltakd.types import Head, PairFacts, TokenFacts
from tests.losses.by_name import loss_named
from tests.losses.oracles import Array, log_softmax

V = 7
#: Tokens of given and own responses, pair by pair.
LENGTHS = [(3, 2), (1, 4), (2, 2)]
N = sum(map(sum, LENGTHS))


def draw(seed: int = 0) -> tuple[Array, Array, Tensor]:
    """Logits of student and teacher, [N, V] float64, and labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in "ab")
    return student.numpy(), teacher.numpy(), torch.randint(0, V, (N,), generator=generator)


def facts(lengths: list[tuple[int, int]] = LENGTHS, **step: float) -> TokenFacts:
    """Of these pairs; by default they are the whole step."""
    rows = [2 * pair + own for pair, both in enumerate(lengths) for own in (0, 1) for _ in range(both[own])]
    rows_N = torch.tensor(rows)
    tokens = sum(map(sum, lengths))
    whole = {"tokens_per_pair": tokens / len(lengths), "tokens_per_given": tokens / sum(g for g, _ in lengths)} | step
    return TokenFacts(rows_N, pairs=PairFacts(rows_N // 2, rows_N % 2 == 0, **whole))


def heads(student: Tensor, teacher: Array) -> dict[str, Head]:
    eye = torch.eye(V, dtype=torch.float64)
    return {"student": Head(student, eye), "teacher": Head(torch.from_numpy(teacher), eye)}


def run(
    student: Array,
    teacher: Array,
    labels: Tensor,
    chunk_size: int = 100,
    lengths: list[tuple[int, int]] = LENGTHS,
    **options: object,
) -> tuple[float, Array, dict[str, float]]:
    """The mean over the step, its gradient in the student's logits, and the parts' means."""
    leaf = torch.from_numpy(student).clone().requires_grad_()
    loss = loss_named("dpkd", **options)
    total, parts = chunked_loss(loss, heads(leaf, teacher), labels, chunk_size, facts=facts(lengths))
    (gradient,) = torch.autograd.grad(total, leaf)
    count = len(labels)
    return total.item() / count, (gradient / count).numpy(), {name: float(part) / count for name, part in parts.items()}


def oracle(student: Array, teacher: Array, labels: Array, beta: float, ce_weight: float, by_mean: bool) -> float:
    """Equation by equation, response by response."""
    log_pi, log_p = log_softmax(student), log_softmax(teacher)
    start, losses, ce = 0, [], []
    for both in LENGTHS:
        rewards = []
        for own, length in enumerate(both):
            places = range(start, start + length)
            terms = [log_pi[i, labels[i]] - log_p[i, labels[i]] for i in places]
            rewards.append(sum(terms) / (length if by_mean else 1))
            ce += [-log_pi[i, labels[i]] for i in places if not own]
            start += length
        losses.append(-math.log(1 / (1 + math.exp(-beta * (rewards[0] - rewards[1])))))
    return float((1 - ce_weight) * np.mean(losses) + ce_weight * np.mean(ce))


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize(("beta", "ce_weight", "by_mean"), [(0.1, 0.5, False), (1.3, 0.0, False), (0.7, 0.2, True)])
def test_value_and_gradient_against_numpy(chunk_size: int, beta: float, ce_weight: float, by_mean: bool) -> None:
    student, teacher, labels = draw()
    options = {"beta": beta, "ce_weight": ce_weight, "length_normalised": by_mean}
    value, gradient, _ = run(student, teacher, labels, chunk_size, **options)
    arguments = (teacher, labels.numpy(), beta, ce_weight, by_mean)
    assert value == pytest.approx(oracle(student, *arguments), rel=1e-9)
    expected = np.zeros_like(student)
    for place in np.ndindex(*student.shape):
        moved = [student.copy(), student.copy()]
        moved[0][place] += 1e-6
        moved[1][place] -= 1e-6
        expected[place] = (oracle(moved[0], *arguments) - oracle(moved[1], *arguments)) / 2e-6
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


def authors_loss(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """``get_distil_loss`` with --seqKD-DPO (dpkd/main.py of microsoft/LMOps), in float64, of tokens that all count."""
    log_teacher, log_student = F.log_softmax(teacher, dim=-1), F.log_softmax(student, dim=-1)
    y_t, y_s = log_teacher.argmax(-1), log_student.argmax(-1)

    def chosen(log_probs: Tensor, tokens: Tensor) -> Tensor:
        return torch.gather(log_probs, 1, tokens.unsqueeze(-1)).squeeze(-1)

    stu_logratios = chosen(log_student, y_t) - chosen(log_student, y_s)
    tea_logratios = chosen(log_teacher, y_t) - chosen(log_teacher, y_s)
    return -F.logsigmoid(beta * (stu_logratios - tea_logratios)).mean()


def test_pairs_of_single_tokens_are_the_authors_pairs() -> None:
    """Their code pairs the teacher's top token with the student's at each place: there both formulas are the same."""
    student, teacher, _ = draw(3)
    beta = 0.1
    leaf = torch.from_numpy(student).clone().requires_grad_()
    expected = authors_loss(leaf, torch.from_numpy(teacher), beta)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    # Each place twice: once for either token.
    places = np.repeat(np.arange(N), 2)
    labels = torch.from_numpy(np.stack([teacher.argmax(-1), student.argmax(-1)], axis=1).reshape(-1))
    value, gradient, _ = run(student[places], teacher[places], labels, lengths=[(1, 1)] * N, ce_weight=0.0, beta=beta)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient.reshape(N, 2, V).sum(1), expected_gradient.numpy(), rtol=1e-9, atol=1e-14)


def test_parts_are_means_over_pairs_and_over_given_tokens() -> None:
    student, teacher, labels = draw(5)
    value, _, parts = run(student, teacher, labels, beta=0.5, ce_weight=0.3)
    assert value == pytest.approx(0.7 * parts["preference"] + 0.3 * parts["ce"], rel=1e-12)
    assert parts["preferred"] * len(LENGTHS) == pytest.approx(round(parts["preferred"] * len(LENGTHS)))
    ends = np.cumsum([0, *[length for both in LENGTHS for length in both]])
    given = np.concatenate([np.arange(ends[2 * pair], ends[2 * pair + 1]) for pair in range(len(LENGTHS))])
    log_pi = log_softmax(student)
    assert parts["ce"] == pytest.approx(-np.mean(log_pi[given, labels.numpy()[given]]), rel=1e-12)


def test_micro_batches_add_up_to_the_step() -> None:
    """Each knows the pairs and tokens of the whole step."""
    student, teacher, labels = draw(6)
    whole, gradient, _ = run(student, teacher, labels, beta=0.5)
    step = {"tokens_per_pair": N / 3, "tokens_per_given": N / 6}
    total, start, gradients = 0.0, 0, []
    for some in (LENGTHS[:1], LENGTHS[1:]):
        stop = start + sum(map(sum, some))
        leaf = torch.from_numpy(student[start:stop]).clone().requires_grad_()
        part, _ = chunked_loss(
            loss_named("dpkd", beta=0.5),
            heads(leaf, teacher[start:stop]),
            labels[start:stop],
            facts=facts(some, **step),
        )
        gradients.append(torch.autograd.grad(part, leaf)[0].numpy() / N)
        total, start = total + part.item() / N, stop
    assert total == pytest.approx(whole, rel=1e-12)
    np.testing.assert_allclose(np.concatenate(gradients), gradient, rtol=1e-12)


def test_without_pairs_it_is_the_cross_entropy() -> None:
    student, teacher, labels = draw(7)
    leaf = torch.from_numpy(student)
    total, parts = chunked_loss(
        loss_named("dpkd"), heads(leaf, teacher), labels, facts=TokenFacts(rows=torch.zeros(N, dtype=torch.long))
    )
    torch.testing.assert_close(total, F.cross_entropy(leaf, labels, reduction="sum"))
    assert list(parts) == ["ce"]


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": -1.0}, {"ce_weight": 2.0}])
def test_wrong_settings_are_named(options: dict[str, float]) -> None:
    with pytest.raises(Exception, match=rf"loss\.{next(iter(options))} is"):
        loss_named("dpkd", **options)
