from __future__ import annotations

import numpy as np
import pytest
import torch

from deltakd.generation.noise import NoiseKey
from deltakd.generation.sampling import TokenChoice, gumbel


def draws(seed: int, row: int, vocab: int = 50, positions: int = 2) -> list[np.ndarray]:
    choice = TokenChoice(vocab)
    return [choice._noise([NoiseKey(seed, row)], [t], torch.device("cpu")).numpy()[0] for t in range(positions)]


def test_noise_is_standard_gumbel() -> None:
    sorted_N = np.sort(np.concatenate(draws(3, 1, vocab=1_000_000, positions=10)))
    # Kolmogorov-Smirnov against exp(-exp(-g)); 1.63 / sqrt(n) is the bound of a 1 % test.
    n = len(sorted_N)
    assert n == 20_000
    distance = np.abs(np.exp(-np.exp(-sorted_N)) - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.63 / np.sqrt(n)


def test_noise_belongs_to_seed_row_and_position() -> None:
    blocks = [*draws(1, 2), *draws(2, 1), *draws(1, 2 + 2**32), *draws(1 + 2**32, 2)]
    assert len({block.tobytes() for block in blocks}) == 8
    np.testing.assert_array_equal(draws(1, 2), draws(1, 2))


def test_a_row_without_a_key_disturbs_nobody() -> None:
    beside = TokenChoice(50)._noise([None, NoiseKey(1, 2)], [0, 0], torch.device("cpu"))
    np.testing.assert_array_equal(beside[1].numpy(), draws(1, 2)[0])
    assert torch.isfinite(beside).all()


def test_the_ends_of_the_unit_interval_stay_finite() -> None:
    noise = gumbel(torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)).numpy()
    assert np.isfinite(noise.astype(np.float32)).all()
    assert (np.diff(noise) < 0).all()


@pytest.mark.parametrize("vocab", [1, 2, 7, 100, 101])
def test_the_most_probable_token_is_the_first_of_the_largest_logits(vocab: int) -> None:
    logits = torch.randint(-3, 3, (64, vocab), generator=torch.Generator().manual_seed(vocab)).float()
    assert TokenChoice(vocab)(logits, None).tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_tokens_of_many_blocks_have_their_probabilities() -> None:
    # 30 tokens in blocks of 6, the probabilities in disorder, some of them 0 and one block without any.
    weights = np.random.default_rng(0).permutation(np.arange(30.0))
    weights[12:18] = 0
    probabilities = weights / weights.sum()
    rows = 20_000
    logits = torch.from_numpy(probabilities).log().float().expand(rows, -1)
    tokens = TokenChoice(30)(logits, [NoiseKey(7, 0)] * rows, range(rows))
    observed = np.bincount(tokens.numpy(), minlength=30)
    possible = probabilities > 0
    assert observed[~possible].sum() == 0
    expected = rows * probabilities[possible]
    chi_square = ((observed[possible] - expected) ** 2 / expected).sum()
    freedom = possible.sum() - 1
    # The normal approximation of Wilson and Hilferty to the bound of a 1 % test.
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 2.326 * np.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("sampled", [False, True])
def test_nan_is_found_wherever_it_is(sampled: bool) -> None:
    logits = torch.zeros(11, 10)
    logits[torch.arange(10), torch.arange(10)] = torch.nan
    tokens = TokenChoice(10)(logits, [NoiseKey(0, row) for row in range(11)] if sampled else None, [0] * 11)
    assert tokens[:10].tolist() == [-1] * 10
    assert tokens[10] >= 0
