"""The distance to a teacher with another tokenizer."""

from __future__ import annotations

import numpy as np
import torch

from deltakd.evaluation.span_measures import span_kl
from deltakd.evaluation.token_measures import token_measures
from deltakd.types import STUDENT, TEACHER, Alignment, Head, TokenMap


def head(tokens: int, vocabulary: int, seed: int) -> Head:
    draw = torch.Generator().manual_seed(seed)
    return Head(*(torch.randn(size, 6, generator=draw, dtype=torch.float64) for size in (tokens, vocabulary)))


def test_with_equal_tokenizers_it_is_the_kl_to_the_teacher() -> None:
    student, teacher = head(9, 20, 1), head(9, 20, 2)
    alignment = Alignment.of(torch.arange(9), torch.arange(9))
    expected = token_measures({STUDENT: student, TEACHER: teacher}, torch.zeros(9, dtype=torch.int64)).kl_teacher
    for chunk_size in (4, 256):
        torch.testing.assert_close(
            span_kl(student, teacher, alignment, TokenMap.identity(20), chunk_size), expected, rtol=1e-12, atol=1e-12
        )


def test_it_is_over_shared_tokens_and_one_bucket_where_each_span_begins() -> None:
    student, teacher = head(5, 7, 3), head(6, 9, 4)
    # Tokens 1 of the student and 3 of the teacher are in no span.
    alignment = Alignment.of(torch.tensor([0, -1, 1, 1, 2]), torch.tensor([0, 0, 1, -1, 2, 2]))
    shared = ([0, 2, 5], [8, 1, 3])
    nothing = torch.full((7,), -1)
    token_map = TokenMap(torch.tensor(shared[0]), torch.tensor(shared[1]), torch.full((9,), -1), nothing)
    found = span_kl(student, teacher, alignment, token_map)
    expected = []
    for ours, theirs in ((0, 0), (2, 2), (4, 4)):
        q, p = (
            np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            for z in (student.logits()[ours].numpy(), teacher.logits()[theirs].numpy())
        )
        p_shared, q_shared = p[shared[1]], q[shared[0]]
        p_all, q_all = (np.append(part, 1 - part.sum()) for part in (p_shared, q_shared))
        expected.append((p_all * np.log(p_all / q_all)).sum())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_no_spans_give_nothing() -> None:
    alignment = Alignment.of(torch.tensor([-1]), torch.tensor([-1, -1]))
    assert len(span_kl(head(1, 7, 1), head(2, 7, 2), alignment, TokenMap.identity(7))) == 0
