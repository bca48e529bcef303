"""The Triton kernels compile for an H100. That needs Triton, but no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("it takes a minute: see `make test-kernels`", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: see `make test-kernels`")

SCRIPT = '''
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltakd.generation.token_kernel import _choice_kernel
from deltakd.kernels.gpu.linear_kl import _gate_kernel, _loss_kernel
from deltakd.kernels.gpu.tails import _spread_kernel, _tail_kernel

INTEGERS = {"columns", "padded", "width", "blocks"}
WORDS = {"labels": "*i64", "words": "*i64", "tokens": "*i64"}
FLOATS = {"inverse_temperature", "temperature", "softcap", "ce_weight", "kl_weight", "gradient_scale", "scale",
          "inverse_nats", "of_target", "of_student", "share"}


def compiled(kernel, gradient="*fp16", **constants):
    """Compile for rows whose starts are multiples of 16, as those of aligned_rows are."""
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS or name.endswith("stride"):
            signature[name] = "i32"
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = WORDS.get(name, gradient if name in ("high", "low") else "*fp32")
        if name == "padded" or name.endswith("stride") or signature[name].startswith("*"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm
    assert "cubin" in made
    return made["ptx"]


for kind, tempered, capped, gated, gradient, summands in (
    (0, False, True, False, "*fp16", 1),
    (1, False, False, False, "*bf16", 2),
    (1, True, False, True, "*fp16", 1),
    (2, True, True, False, "*fp32", 1),
    (2, False, False, False, "*fp32", 0),
    (3, True, True, True, "*fp16", 1),
    (3, False, False, False, "*fp32", 0),
):
    ptx = compiled(
        _loss_kernel, gradient, KIND=kind, TEMPERED=tempered, HAS_CAP=capped, HAS_GATE=gated, SUMMANDS=summands,
        LARGEST=65504.0 if gradient == "*fp16" else 0.0, BLOCK=4096,
    )
    # 16 bytes at a time, whatever the vocabulary; single numbers are the label, its logit and the gate.
    assert ptx.count("ld.global.v4") >= 8
    assert ptx.count("ld.global") - ptx.count("ld.global.v4") <= 3
assert "ld.global.v4" in compiled(_gate_kernel, BLOCK=4096)
assert "ld.global.v4" in compiled(_tail_kernel, TEMPERED=True, BLOCK=4096)
assert "ld.global.v4" in compiled(
    _spread_kernel, "*bf16", TEMPERED=True, HAS_CAP=True, SUMMANDS=2, LARGEST=0.0, BLOCK=4096
)
assert "mul.hi.u64" in compiled(_choice_kernel, BLOCKS=16, WIDTH=512)
print("compiled")
'''


def test_every_kernel_compiles_and_loads_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.stdout == "compiled\n", done.stderr[-2000:]
