"""Rows of logits lie where matrix products are fast, and hold the same numbers."""

from __future__ import annotations

import pytest
import torch

from deltakd.types import Head
from deltakd.types.heads import aligned_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 15, 16, 1024, 50_257])
def test_rows_begin_at_multiples_of_64_bytes_but_not_of_a_page(columns: int, dtype: torch.dtype) -> None:
    made = aligned_rows(3, columns, like=torch.empty(0, dtype=dtype))
    assert made.shape == (3, columns)
    assert made.dtype == dtype
    pitch = made.stride(0) * made.itemsize
    assert pitch % 64 == 0
    assert pitch % 4096 != 0
    assert made.stride(1) == 1


def test_a_sum_of_logits_in_aligned_rows_equals_the_logits() -> None:
    hidden, weight, bias = torch.randn(5, 8), torch.randn(33, 8), torch.randn(33)
    head = Head(hidden, weight, bias, scale=0.5)
    made = head.add_logits(None, 2.0)
    assert made.stride(0) == 48
    torch.testing.assert_close(made, 2.0 * head.logits())
