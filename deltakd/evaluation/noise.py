"""Sampling noise that belongs to (seed, row, position), and to nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def row_stream(seed: int, row_id: int) -> np.random.Generator:
    """The random stream of one row under one seed; position t takes the t-th block of V draws.

    NumPy's generator, not torch's: torch's CPU generator reads 32 bits of its seed only, so that rows of a large
    study would share streams, and it draws doubles at less than half the speed (0.33 against 0.14 ms for 50,257).
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(row_id,))))


class GumbelNoise:
    """Gumbel noise for up to ``batch_size`` rows, in buffers that are made once.

    Args:
        batch_size: the most rows in a call.
        vocab_size: V, draws for a row and position.
    """

    def __init__(self, batch_size: int, vocab_size: int) -> None:
        self._uniform_BV = np.zeros((batch_size, vocab_size))

    def draw(self, streams: Sequence[np.random.Generator | None], device: torch.device) -> Tensor:
        """[B, V] float32 standard Gumbel noise on ``device``; a row whose stream is None gets some finite noise."""
        for stream, row_V in zip(streams, self._uniform_BV, strict=False):
            if stream is not None:
                stream.random(out=row_V)
        uniform_BV = torch.from_numpy(self._uniform_BV[: len(streams)]).float().to(device)
        return _gumbel(uniform_BV)


def _gumbel(uniform_BV: Tensor) -> Tensor:
    """−log(−log(1 − u)), finite for every u in [0, 1].

    The winners of the race have u near 0, where float32 is fine-grained as long as u was *drawn* as a double. Drawn
    in float32, u is a multiple of 2⁻²⁴: about one position in a hundred would hold an exact 0 among 150,000 tokens,
    and that token would win whatever its probability.
    """
    uniform_BV = uniform_BV.clamp_(2.0**-54, 1 - 2.0**-24)
    return torch.log1p(uniform_BV.neg_()).neg_().log_().neg_()
