from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from deltakd.generation import Decoding, generate


class OneStep(nn.Module):
    """A model whose next-token distribution is given."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())
        self.config = PretrainedConfig()

    def forward(self, input_ids: torch.Tensor, past_key_values: object = None, **_: Any) -> Any:
        logits = self.logits.expand(input_ids.shape[0], 1, -1)
        return ModelOutput(logits=logits, past_key_values=object())


def counts(decoding: Decoding, rows: int) -> list[int]:
    answers = generate(
        OneStep([0.5, 0.25, 0.15, 0.1]),
        [[1]] * rows,
        range(rows),
        decoding=decoding,
        seeds=[10],
        batch_size=500,
        eos_ids=frozenset(),
        vocab_size=4,
        pad_id=0,
    )
    tokens = torch.tensor(answers[0]).flatten()
    return torch.bincount(tokens, minlength=4).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [0.7246, 0.1812, 0.0652, 0.0290]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.8}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
    ],
    ids=["plain", "temperature", "top_k", "top_p"],
)
def test_tokens_are_sampled_with_their_probabilities(options: dict[str, Any], expected: list[float]) -> None:
    observed = counts(Decoding(max_new_tokens=1, **options), rows=4000)
    assert sum(observed) == 4000
    support = [i for i, p in enumerate(expected) if p > 0]
    assert all(observed[i] == 0 for i in range(4) if i not in support)
    chi_square = sum((observed[i] - 4000 * expected[i]) ** 2 / (4000 * expected[i]) for i in support)
    # The bounds of a 1 % test with 1, 2 and 3 degrees of freedom.
    assert chi_square < {2: 6.63, 3: 9.21, 4: 11.34}[len(support)]
