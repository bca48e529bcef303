"""Kernels: losses over heads, multiplied out chunk by chunk, so that no [N, V] tensor ever exists."""

from deltakd.kernels.aligned import aligned_loss
from deltakd.kernels.blocks import ChunkBuffers, row_blocks
from deltakd.kernels.buckets import BucketLogits, Buckets
from deltakd.kernels.chunked import chunked_loss
from deltakd.kernels.label_log_probs import label_log_probs
from deltakd.kernels.options import MEMORY_BUDGET, KernelOptions, chunk_size_for
from deltakd.types import Head

__all__ = [
    "MEMORY_BUDGET",
    "BucketLogits",
    "Buckets",
    "ChunkBuffers",
    "Head",
    "KernelOptions",
    "aligned_loss",
    "chunk_size_for",
    "chunked_loss",
    "label_log_probs",
    "row_blocks",
]
