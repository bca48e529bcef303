"""Reads DeepSpeed's checkpoints on a different number of ranks than wrote them."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.strategies import DeepSpeedStrategy

log = logging.getLogger(__name__)

#: The folder of DeepSpeed's files in a checkpoint (Lightning's name for it).
TAG = "checkpoint"


def ranks_of(checkpoint: Path) -> int:
    """Return how many ranks wrote a DeepSpeed checkpoint: each wrote its part of the optimiser state."""
    return len(list((checkpoint / TAG).glob("*_optim_states.pt")))


@contextlib.contextmanager
def for_any_ranks(checkpoint: Path, strategy: DeepSpeedStrategy) -> Iterator[Path]:
    """Convert a checkpoint to DeepSpeed's universal format, next to it and only for the duration of the context.

    Collective: call on every rank.

    Raises:
        OSError: the disk is full; the copy is as large as the checkpoint itself.
    """
    universal = checkpoint.with_name(f"{checkpoint.name}.universal")
    # No barrier in `finally`: if one rank fails, the others may never reach it.
    try:
        if strategy.is_global_zero:
            ranks = ranks_of(checkpoint)
            log.info("%s was written by %d processes and is converted for %d.", checkpoint, ranks, strategy.world_size)
            shutil.rmtree(universal, ignore_errors=True)
            _convert(checkpoint / TAG, universal / TAG)
        strategy.barrier()
        yield universal
        strategy.barrier()
    finally:
        if strategy.is_global_zero:
            shutil.rmtree(universal, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        # More workers would fork a process with threads, and hold several parts in memory.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # Silence its messages and progress bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
