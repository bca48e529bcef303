"""The order of the rows: an endless stream of epochs, each a seeded permutation."""

from __future__ import annotations

from typing import final

import numpy as np
from numpy.typing import NDArray

#: Number of permutations cached, so that requests close together do not draw them again.
_KEPT = 4


@final
class RowStream:
    """Epoch after epoch of row numbers; a pure function of seed and number of rows.

    Args:
        rows: number of rows in the data set.
        seed: for the permutations.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def __getitem__(self, part: slice) -> NDArray[np.int64]:
        """Return [stop - start] int64 row numbers at places ``start`` to ``stop`` (exclusive) of the stream."""
        pieces = [np.empty(0, dtype=np.int64)]
        for epoch in range(part.start // self.rows, (part.stop - 1) // self.rows + 1):
            skipped = epoch * self.rows
            pieces.append(self._permutation(epoch)[max(0, part.start - skipped) : part.stop - skipped])
        return np.concatenate(pieces)

    def shuffled(self, count: int, first_step: int) -> NDArray[np.int64]:
        """Return [count], the shuffled order of the steps of the window that starts at ``first_step``."""
        return shuffled_steps(self.seed, count, first_step)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._permutations:
            if len(self._permutations) >= _KEPT:
                self._permutations.clear()
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._permutations[epoch] = generator.permutation(self.rows).astype(np.int64)
        return self._permutations[epoch]


def shuffled_steps(seed: int, count: int, first_step: int) -> NDArray[np.int64]:
    """Return [count], the shuffled order of the steps of the window that starts at ``first_step``."""
    # The 1 keeps these draws apart from the permutations of rows.
    return np.random.Generator(np.random.PCG64([seed, first_step, 1])).permutation(count)
