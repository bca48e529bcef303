"""The kernel that chooses tokens on a GPU, against the choice on a CPU; see tests/kernels/test_gpu.py."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and no TRITON_INTERPRET=1: see `make test-kernels`", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: see `make test-kernels`")

from deltakd.generation import token_kernel  # noqa: E402
from deltakd.generation.noise import NoiseKey  # noqa: E402
from deltakd.generation.sampling import TokenChoice  # noqa: E402
from deltakd.types import triton_devices  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def both(logits_BV: Tensor, keys: list[NoiseKey | None], positions: list[int]) -> tuple[list[int], list[int]]:
    """Return the tokens that a CPU and the kernel choose."""
    choice = TokenChoice(logits_BV.shape[1])
    on_cpu = choice(logits_BV, keys, positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_devices, "DEVICES", frozenset({"cpu", "cuda"}))
        calls: list[int] = []
        plain = token_kernel.choose
        patch.setattr(token_kernel, "choose", lambda *args: calls.append(1) or plain(*args))
        by_kernel = choice(logits_BV.to(DEVICE), keys, positions)
    assert calls == [1]
    return on_cpu.tolist(), by_kernel.tolist()


@pytest.mark.parametrize("v", [1, 2, 5, 37, 1000, 50_257])
def test_the_noise_is_that_of_a_cpu(v: int) -> None:
    """Where all tokens are equally probable the noise alone chooses."""
    keys = [NoiseKey(10, row, step=row % 3, sample=row % 2) for row in range(6)] + [
        NoiseKey(2**64 - 1, 2**63 + 5, 2**33, 2),
        NoiseKey(0, 0),
    ]
    on_cpu, by_kernel = both(torch.zeros(8, v), keys, [0, 1, 2, 3, 500, 7, 1000, 0])
    assert by_kernel == on_cpu
    if v > 100:
        assert len(set(on_cpu)) > 4


def test_likely_tokens_and_tokens_ruled_out() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BV = 3 * torch.randn(12, 301, generator=generator)
    logits_BV[:4, ::2] = -torch.inf
    logits_BV[4:6, 5:] = -torch.inf
    keys: list[NoiseKey | None] = [NoiseKey(3, row) for row in range(12)]
    on_cpu, by_kernel = both(logits_BV, keys, list(range(12)))
    assert by_kernel == on_cpu
    assert all(token % 2 for token in on_cpu[:4])


def test_a_row_that_is_no_distribution_is_told_apart_and_no_row_reads_another() -> None:
    logits_BV = torch.zeros(4, 50)
    logits_BV[0, 7] = torch.inf
    logits_BV[1, 33] = torch.nan
    logits_BV[2] = -torch.inf  # no token is possible
    on_cpu, by_kernel = both(logits_BV, [NoiseKey(1, 1), NoiseKey(1, 2), NoiseKey(1, 3), None], [0, 0, 0, 0])
    assert by_kernel[:3] == on_cpu[:3]
    assert by_kernel[:3] == [-1, -1, -1]
    assert 0 <= by_kernel[3] < 50
    # Columns far apart, as in a transposed matrix.
    keys: list[NoiseKey | None] = [NoiseKey(1, 1)] * 4
    on_cpu, by_kernel = both(torch.zeros(50, 4).T, keys, [0, 1, 2, 3])
    assert by_kernel == on_cpu


def test_no_rows() -> None:
    empty = torch.empty(0, 50, device=DEVICE)
    assert len(token_kernel.choose(empty, torch.empty(0, 5, dtype=torch.int64, device=DEVICE), 8)) == 0
