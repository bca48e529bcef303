"""What transformers need not ask the device about a batch: which positions belong to one row.

A causal model whose rows are padded on the right needs no mask of the padding: no real token comes after it. Without
one, PyTorch's attention takes its fastest kernel. But transformers then looks for packed rows in the position ids and,
in some models, for padding in the tokens. On a GPU each look makes the host wait until the device has done all that is
queued, in every forward pass. This module answers both beforehand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_one_at_a_time = threading.RLock()


def _unpacked(position_ids: Tensor) -> None:
    """In place of ``find_packed_sequence_indices``: every sequence is one row."""


def _packed(position_ids: Tensor) -> Tensor:
    """In place of ``find_packed_sequence_indices``: [S, L], a number for each row, which starts at position 0."""
    return (position_ids == 0).cumsum(-1)


def _silent(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """In place of ``warn_if_padding_and_no_attention_mask``."""


def one_row_each() -> AbstractContextManager[None]:
    """Within it, forward passes without an attention mask take every sequence for one row, and do not look."""
    return _answering(_unpacked, _silent)


def many_rows_each() -> AbstractContextManager[None]:
    """Within it, forward passes without an attention mask begin a row wherever a position is 0, and do not look."""
    return _answering(_packed, _silent)


@contextmanager
def _answering(packed: Callable[..., Any], padded: Callable[..., Any]) -> Iterator[None]:
    # Where a model runs they are loaded anyway; reading a config should not load them.
    from transformers import PreTrainedModel, masking_utils

    looks: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (masking_utils, "find_packed_sequence_indices", packed),
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask", padded),
    )
    with _one_at_a_time:
        # A release of transformers may lack one.
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in looks if hasattr(owner, name)]
        for owner, name, answer in looks:
            if hasattr(owner, name):
                setattr(owner, name, answer)
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)
