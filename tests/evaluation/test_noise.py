from __future__ import annotations

import numpy as np
import torch

from deltakd.evaluation.noise import GumbelNoise, _gumbel, row_stream

CPU = torch.device("cpu")


def test_noise_is_standard_gumbel() -> None:
    noise_BV = GumbelNoise(4, 5000).draw([row_stream(3, row) for row in range(4)], CPU)
    assert noise_BV.dtype == torch.float32
    # Kolmogorov-Smirnov against exp(-exp(-g)); 1.63 / sqrt(n) is the bound of a 1 % test.
    sorted_N = np.sort(noise_BV.flatten().double().numpy())
    n = len(sorted_N)
    distance = np.abs(np.exp(-np.exp(-sorted_N)) - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.63 / np.sqrt(n)


def test_noise_belongs_to_seed_row_and_position() -> None:
    def draw(seed: int, row: int, positions: int = 2) -> list[np.ndarray]:
        stream = row_stream(seed, row)
        return [GumbelNoise(1, 50).draw([stream], CPU).numpy()[0] for _ in range(positions)]

    blocks = [*draw(1, 2), *draw(2, 1), *draw(1, 2 + 2**32), *draw(1 + 2**32, 2)]
    assert len({block.tobytes() for block in blocks}) == 8
    np.testing.assert_array_equal(draw(1, 2), draw(1, 2))


def test_a_row_without_a_stream_draws_nothing_and_disturbs_nobody() -> None:
    alone = GumbelNoise(1, 50).draw([row_stream(1, 2)], CPU)[0]
    beside = GumbelNoise(3, 50).draw([None, row_stream(1, 2)], CPU)
    assert torch.equal(beside[1], alone)
    assert torch.isfinite(beside).all()


def test_the_ends_of_the_unit_interval_stay_finite() -> None:
    noise = _gumbel(torch.tensor([0.0, 2.0**-53, 0.5, 1.0]))
    assert torch.isfinite(noise).all()
    assert noise[0] > noise[1] > noise[2] > noise[3]


def test_noise_is_drawn_as_doubles() -> None:
    # Uniforms of float32 are multiples of 2^-24, and an exact 0 among them would beat every probability.
    noise = GumbelNoise(1, 1000)
    noise.draw([row_stream(1, 2)], CPU)
    assert (noise._uniform_BV * 2**24 % 1 != 0).all()
