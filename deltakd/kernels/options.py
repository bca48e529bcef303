"""How the chunked loss computes: its memory, its matrix products, and whether Triton kernels may help."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from deltakd.kernels import gpu
from deltakd.types import Products

#: MiB that the logits of a chunk, and everything computed from them, may take on a CPU.
MEMORY_BUDGET = 256.0
#: The share of a GPU's memory instead: 1.4 GiB of 80 GB, 1,100 tokens of a vocabulary of 128,256.
_GPU_SHARE = 1 / 56
#: Tensors the size of a chunk's logits that exist at once: by hand, without and with a gate, over a reduced vocabulary,
#: and under autograd in the most demanding loss.
_TENSORS = {"fused": 2, "gated": 3, "buckets": 4, "autograd": 16}
#: Smaller chunks spend their time on the head's gradient, which each chunk adds to as a whole.
_MIN_CHUNK = 32
#: Tokens per streaming multiprocessor of a GPU beyond which a longer chunk gains nothing.
_MAX_ROWS_PER_SM = 32
#: Tensor cores work on tiles of this many rows.
_TILE = 128


@dataclass(frozen=True)
class KernelOptions:
    """How to compute a chunked loss.

    Args:
        memory_budget: MiB for the logits of a chunk and everything computed from them. The gradient of the head, at
            least float32, and converted copies of heads come on top. None: 256 on a CPU, 1/56 of a GPU's memory.
        products: how heads are multiplied on a GPU.
        triton: use Triton kernels where they serve (NVIDIA GPUs with Triton installed).
    """

    memory_budget: float | None = None
    products: Products = Products.EXACT
    triton: bool = True

    def record(self, device: torch.device) -> dict[str, str | float | bool]:
        """Return what is chosen on a device, for the log and a run's record."""
        return {
            "products": self.products.on(device).value,
            "triton": self.triton and gpu.serves(device, torch.float32),
            "memory_budget": round(self.budget(device), 1),
        }

    def budget(self, device: torch.device) -> float:
        """Return the MiB for a chunk on a device."""
        if self.memory_budget is not None:
            return self.memory_budget
        return MEMORY_BUDGET if device.type != "cuda" else _gpu(device)[0] * _GPU_SHARE / 2**20

    def chunk_size(self, tokens: int, vocabulary: int, itemsize: int, form: str, device: torch.device) -> int:
        """Return the number of tokens per chunk; arguments as for ``chunk_size_for``, of ``tokens`` in all."""
        if device.type != "cuda":
            return chunk_size_for(self.budget(device), vocabulary, itemsize, form)
        # The gradient as it is multiplied comes on top of the logits.
        row = vocabulary * (_TENSORS[form] * itemsize + 4)
        affordable = int(self.budget(device) * 2**20 / row)
        return even_chunks(tokens, affordable, _gpu(device)[1] * _MAX_ROWS_PER_SM)


def even_chunks(tokens: int, affordable: int, enough: int) -> int:
    """Return a chunk size that cuts tokens into chunks of nearly equal size, of whole tiles where that is possible.

    Args:
        tokens: how many there are.
        affordable: the largest size that memory allows; at least 32 are taken.
        enough: a size that fills the GPU.
    """
    size = max(_MIN_CHUNK, min(affordable, enough))
    if size < _TILE or tokens <= size:
        return size
    size -= size % _TILE
    chunks = -(-tokens // size)
    return -(-tokens // (chunks * _TILE)) * _TILE


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Return the bytes and the streaming multiprocessors of a GPU."""
    found = torch.cuda.get_device_properties(device)
    return found.total_memory, found.multi_processor_count


def chunk_size_for(memory_budget: float, vocabulary: int, itemsize: int, form: str) -> int:
    """Return the number of tokens per chunk that fits in ``memory_budget`` MiB; at least 32, even if that takes more.

    Args:
        memory_budget: MiB.
        vocabulary: V.
        itemsize: bytes of a logit.
        form: ``fused`` or ``gated`` (by hand), ``buckets`` (over a reduced vocabulary), or ``autograd``.
    """
    return max(_MIN_CHUNK, int(memory_budget * 2**20 / (_TENSORS[form] * vocabulary * itemsize)))
