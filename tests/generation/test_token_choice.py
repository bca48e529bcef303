from __future__ import annotations

import numpy as np
import pytest
import torch

from deltakd.generation.sampling import TokenChoice, gumbel, row_stream


def draws(seed: int, row: int, vocab: int = 50, positions: int = 2) -> list[np.ndarray]:
    stream, choice = row_stream(seed, row), TokenChoice(vocab)
    return [choice._noise([stream]).numpy()[0] for _ in range(positions)]


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


def test_the_noise_of_a_stream_is_the_same_everywhere() -> None:
    # PCG64 seeded by SeedSequence is fixed by NumPy's compatibility policy (NEP 19): a change would change all samples.
    expected = [np.random.default_rng(np.random.SeedSequence(10, spawn_key=(3,))).random(15)]
    np.testing.assert_array_equal(draws(10, 3, positions=1), gumbel(np.array(expected))[:, :15])


def test_a_row_without_a_stream_draws_nothing_and_disturbs_nobody() -> None:
    choice = TokenChoice(50)
    beside = choice._noise([None, row_stream(1, 2)])
    np.testing.assert_array_equal(beside[1].numpy(), draws(1, 2)[0])
    assert torch.isfinite(beside).all()


def test_the_ends_of_the_unit_interval_stay_finite() -> None:
    noise = gumbel(np.array([0.0, 2.0**-53, 0.5, 1 - 2.0**-53]))
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
    tokens = TokenChoice(30)(logits, [row_stream(7, 0)] * rows)
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
    tokens = TokenChoice(10)(logits, [row_stream(0, row) for row in range(11)] if sampled else None)
    assert tokens[:10].tolist() == [-1] * 10
    assert tokens[10] >= 0
