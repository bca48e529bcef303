"""Whether a head's bias rules tokens out, asked of the device once."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_FOUND: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def is_finite(bias: Tensor) -> bool:
    """Return False if a bias has −inf.

    A GPU is asked once per parameter, since every read waits for it: training gives no bias a −inf that it had not.
    """
    if bias.device.type == "cpu":
        return bool(bias.isfinite().all())
    # A bias cut to the vocabulary is a new view at each step.
    owner = bias if bias._base is None else bias._base
    if owner not in _FOUND:
        _FOUND[owner] = bool(bias.isfinite().all())
    return _FOUND[owner]
