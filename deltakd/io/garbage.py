"""What an ended run leaves in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

#: True from the start of a run to its good end.
_is_left = False


@contextmanager
def nothing_left() -> Iterator[None]:
    """Free at the end what a run had: its models, optimiser and cached references.

    Module and trainer refer to each other, so only Python's search for cycles frees them. Left to itself it looks for
    old ones when a quarter as many objects again have been made: after dozens of small runs, while a device's memory
    is full after a few large ones. Only what was made within is searched: all that libraries hold takes half a second.
    What a failed run had is held by its traceback for longer than this, so the next run begins with a whole search.
    """
    global _is_left
    if _is_left:
        gc.collect()
    _is_left = True
    gc.freeze()
    try:
        yield
        _is_left = False
    finally:
        gc.collect()
        gc.unfreeze()
