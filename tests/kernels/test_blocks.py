"""Memory for logits: what a chunk leaves to the next changes nothing."""

from __future__ import annotations

import pytest
import torch

from deltakd.kernels.blocks import ChunkBuffers
from deltakd.types import STUDENT, Head, HeadLogits


def head(softcap: float | None = None, rows: int = 5) -> Head:
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = torch.randn(rows, 4, generator=generator), torch.randn(7, 4, generator=generator)
    return Head(hidden, weight, torch.randn(7, generator=generator), softcap)


def test_chunks_share_memory_and_a_larger_one_gets_more() -> None:
    buffers = ChunkBuffers()
    first = buffers.logits("student", head())
    assert first.shape == (5, 7)
    assert buffers.logits("student", head(rows=3)).data_ptr() == first.data_ptr()
    assert buffers.logits("target", head()).data_ptr() != first.data_ptr()
    assert buffers.logits("student", head(rows=9)).shape == (9, 7)


def test_another_vocabulary_or_type_gets_memory_of_its_own() -> None:
    buffers = ChunkBuffers()
    buffers.logits("student", head())
    one = head()
    smaller = Head(one.hidden, one.weight[:6], one.bias[:6] if one.bias is not None else None)
    assert buffers.logits("student", smaller).shape == (5, 6)
    double = Head(one.hidden.double(), one.weight.double())
    assert buffers.logits("student", double).dtype == torch.float64


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("coefficients", [{"teacher": 1.5}, {STUDENT: 0.5}, {STUDENT: 0.5, "teacher": 1.0}])
def test_what_a_buffer_holds_before_does_not_matter(softcap: float | None, coefficients: dict[str, float]) -> None:
    student_NV = head().logits()
    logits = HeadLogits(student_NV, {"teacher": head(softcap)})
    into_NV = torch.full((5, 7), torch.nan)
    found_NV = logits.combined(coefficients, into_NV)
    assert found_NV.data_ptr() == into_NV.data_ptr()
    assert torch.equal(found_NV, logits.combined(coefficients))
    assert torch.equal(
        head(softcap).add_logits(torch.full((5, 7), torch.nan), 2.0, beta=0.0), 2 * head(softcap).logits()
    )
