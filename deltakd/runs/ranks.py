"""Which process this is, known before any trainer exists."""

from __future__ import annotations

from lightning.fabric.utilities.rank_zero import rank_zero_only


def is_main_process() -> bool:
    """Whether this process is the one that writes: rank 0, from what the launcher left in the environment."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0
