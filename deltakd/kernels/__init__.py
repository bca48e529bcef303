"""Kernels: heads multiplied out chunk by chunk, so that no tensor of N · V ever exists."""

from deltakd.kernels.chunked import chunked_loss

__all__ = ["chunked_loss"]
