"""Noise by key and position: NumPy's Philox is the oracle for the arithmetic in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltakd.generation.noise import NoiseKey, _by_numpy, _by_torch, philox, uniform

KEYS = [
    NoiseKey(0, 0),
    NoiseKey(10, 3),
    NoiseKey(2**64 - 1, 2**63 + 5, 7, 2),
    NoiseKey(1, 2**40, 2**33, 0),
]


def test_the_arithmetic_in_torch_is_numpys_philox_bit_for_bit() -> None:
    positions = [0, 5, 1000, 77]
    expected = _by_numpy(KEYS, positions, 113)
    np.testing.assert_array_equal(_by_torch(KEYS, positions, 113, torch.device("cpu")).numpy(), expected)


def test_known_words() -> None:
    # Random123's known answer for philox4x64 with ten rounds, counter and key 0.
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(word) % 2**64 for word in philox([zero] * 4, [zero] * 2)]
    assert words == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


def test_a_number_depends_on_its_key_and_position_alone() -> None:
    together = uniform(KEYS, [3, 1, 4, 1], 21)
    for key, position, row in zip(KEYS, [3, 1, 4, 1], together, strict=True):
        assert torch.equal(uniform([key], [position], 21)[0], row)
    assert torch.equal(uniform([None, KEYS[1]], [9, 1], 21)[1], together[1])


@pytest.mark.parametrize("change", [{"seed": 11}, {"row": 4}, {"step": 1}, {"sample": 1}])
def test_other_keys_and_positions_have_other_numbers(change: dict[str, int]) -> None:
    key = NoiseKey(10, 3)
    blocks = [*uniform([key, key, key._replace(**change)], [0, 1, 0], 400)]
    values = torch.cat(blocks)
    assert len(values.unique()) == 1200


def test_a_row_without_a_key_gets_zeros_on_every_path() -> None:
    assert not _by_numpy([None], [3], 5).any()
    assert not _by_torch([None, KEYS[0]], [3, 3], 5, torch.device("cpu"))[0].any()
