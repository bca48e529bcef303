"""Samples each row's next token, with noise that depends only on the row's key and the position (``noise.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import final

import torch
from torch import Tensor

from deltakd.generation.noise import NoiseKey, counters, uniform
from deltakd.types.triton_devices import run_triton


@final
class TokenChoice:
    """Chooses each row's most probable token, or samples one.

    Sampling is Gumbel-max (arXiv 1411.0030) in two stages. Tokens fall into N blocks of K ≈ √V neighbours. The argmax
    of log Σ exp(logits of a block) plus Gumbel noise samples a block; the argmax of the logits plus fresh noise within
    that block samples a token given the block. The distribution is that of one stage over all V tokens, but a token
    takes N + K draws instead of V (449 for 50,257): drawing them on the CPU costs little compared with a step of the
    model, and little is sent to a GPU. Rounding of the logits matters only in a near-tie.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self._block = isqrt(max(vocab_size - 1, 0)) + 1
        self._blocks = -(-vocab_size // self._block)

    def __call__(
        self, logits_BV: Tensor, keys: Sequence[NoiseKey | None] | None, positions: Sequence[int] = ()
    ) -> Tensor:
        """Return [B] int64 token ids; −1 if a logit is NaN, and where the row is sampled, if one is +∞ or all are −∞.

        Args:
            logits_BV: at least float32; −∞ is a probability of 0.
            keys: whose noise each row gets; None for a row whose token will not be used. None instead of the list:
                take the most probable tokens.
            positions: for each row the number of new tokens before this one; unused without keys.
        """
        if keys is not None and logits_BV.dtype == torch.float32 and run_triton(logits_BV.device):
            return self._by_triton(logits_BV, keys, positions)
        noise = None
        if keys is None:
            block_BN = self._of_blocks(logits_BV, torch.amax)
        else:
            # One pass of exponentials: logsumexp takes twice the time.
            block_BN = self._of_blocks(logits_BV.softmax(1), torch.sum).log_()
            noise = self._noise(keys, positions, logits_BV.device).to(logits_BV)
            block_BN += noise[:, : self._blocks]
        best_B1 = block_BN.argmax(dim=1, keepdim=True)
        is_nan_B1 = block_BN.gather(1, best_B1).isnan()
        ids_BK = best_B1 * self._block + torch.arange(self._block, device=logits_BV.device)
        last = logits_BV.shape[1] - 1
        within_BK = logits_BV.gather(1, ids_BK.clamp(max=last)).masked_fill(ids_BK > last, -torch.inf)
        if noise is not None:
            within_BK += noise[:, self._blocks :]
        tokens_B1 = ids_BK.gather(1, within_BK.argmax(dim=1, keepdim=True))
        return tokens_B1.masked_fill(is_nan_B1, -1).squeeze(1)

    def _by_triton(self, logits_BV: Tensor, keys: Sequence[NoiseKey | None], positions: Sequence[int]) -> Tensor:
        # Triton is imported where it is used: not every machine has it.
        from deltakd.generation import token_kernel

        words_B5 = counters(keys, positions, self._blocks + self._block, logits_BV.device)
        return token_kernel.choose(logits_BV, words_B5, self._block)

    def _of_blocks(self, logits_BV: Tensor, reduced: Callable[..., Tensor]) -> Tensor:
        # The last block may be short; reducing it separately is cheaper than padding a copy of all logits.
        whole = logits_BV.shape[1] // self._block * self._block
        found_BN = reduced(logits_BV[:, :whole].unflatten(1, (-1, self._block)), dim=2)
        if whole == logits_BV.shape[1]:
            return found_BN
        return torch.cat([found_BN, reduced(logits_BV[:, whole:], dim=1, keepdim=True)], dim=1)

    def _noise(self, keys: Sequence[NoiseKey | None], positions: Sequence[int], device: torch.device) -> Tensor:
        """Return [B, N + K] float64 Gumbel noise; a row without a key gets some finite values."""
        return gumbel(uniform(keys, positions, self._blocks + self._block, device))


def gumbel(uniform: Tensor) -> Tensor:
    """Return −log(−log(1 − u)) in float64, finite for every double u in [0, 1).

    The winners have u near 0, where doubles are fine-grained enough. In float32, u would be a multiple of 2⁻²⁴: one
    position in tens of thousands would hold an exact 0, and its token would win whatever its probability.
    """
    return -torch.log(-torch.log1p(-uniform.clamp_min(2.0**-54)))
