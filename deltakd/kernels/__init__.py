"""Kernels: heads multiplied out chunk by chunk, so that no tensor of N · V ever exists."""

from deltakd.kernels.chunked import MEMORY_BUDGET, chunked_loss

__all__ = ["MEMORY_BUDGET", "chunked_loss"]
