"""Time and peak extra memory of losses over heads, forward and backward, side by side in one run.

    # What Delta-KD costs beside KD, heads of equal sizes:
    python experiments/benchmark_loss/benchmark.py --losses kd delta_kd --tokens 512
    # What chunks and fusing bring, and how far it is to the bare matrix products:
    python experiments/benchmark_loss/benchmark.py --losses delta_kd --forms plain chunked products --teacher-width 512
    # On an NVIDIA GPU, at the shapes of GPT-2 124M and XL, beside Liger (pip install liger-kernel; it has no delta_kd):
    python experiments/benchmark_loss/benchmark.py --device cuda --dtype bfloat16 --tokens 8192 --student-width 768 \
        --teacher-width 1600 --vocabulary 151936 --losses kd delta_kd --forms plain chunked liger products

Forms: ``chunked`` is what trains; ``plain`` multiplies all heads out and leaves the rest to autograd; ``products`` does
the matrix products of the chunked form and nothing else: no loss can be cheaper; ``liger`` is Liger's fused linear JSD
at beta 0 (forward KL, two heads, a GPU). Every form is run once to warm up,
then all in turn for some rounds; the table has each one's fastest round (other programs only ever add time), its peak
of memory beyond what was there before (heads not counted, gradients counted; on a CPU measured in a process of its
own), and both as ratios to the first line. On a GPU the machine's own rates are measured, too, and each line has its
distance from the floor: operations over the matrix rate, or bytes that must move over the bandwidth if that is longer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deltakd.config.compose import compose_config
from deltakd.kernels import chunked_loss
from deltakd.types import STUDENT, Head, Loss


def make_loss(name: str) -> Loss:
    """Return a ready-made loss by name."""
    config = compose_config("train", ["data.train=none", f"loss={name}"])
    loss: Loss = instantiate(OmegaConf.to_container(config.loss, resolve=True), _convert_="all")
    return loss


def make_heads(
    roles: Sequence[str],
    tokens: int,
    vocabulary: int,
    student_width: int,
    teacher_width: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> dict[str, Head]:
    """Return random heads whose logits have a standard deviation of about 3."""
    generator = torch.Generator().manual_seed(0)
    heads = {}
    for role in roles:
        width = student_width if role.startswith(STUDENT) else teacher_width
        hidden = torch.randn(tokens, width, generator=generator)
        weight = torch.randn(vocabulary, width, generator=generator) * (3 / width**0.5)
        trained = role == STUDENT
        tensors = (tensor.to(device, dtype).requires_grad_(trained) for tensor in (hidden, weight))
        heads[role] = Head(*tensors)
    return heads


def reset_peak() -> None:
    """Forget the peak of resident memory so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident(key: str) -> float:
    """Return ``VmRSS`` (now) or ``VmHWM`` (peak since the reset) of this process in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark needs Linux")


def wait() -> None:
    """Wait for the GPU, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def fastest(forms: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return form -> its fastest round (s); the forms take turns."""
    for run in forms.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, run in forms.items():
            wait()
            started = time.perf_counter()
            run()
            wait()
            times[name].append(time.perf_counter() - started)
    return {name: min(seconds) for name, seconds in times.items()}


def extra_memory(run: Callable[[], None]) -> float:
    """Return the peak memory of a run beyond what was there before, in MiB, returned gradients included."""
    run()
    if torch.cuda.is_initialized():
        wait()
        torch.cuda.reset_peak_memory_stats()
        there = torch.cuda.memory_allocated()
        run()
        wait()
        return (torch.cuda.max_memory_allocated() - there) / 2**20
    reset_peak()
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def extra_memory_in_own_process(line: str, argv: Sequence[str]) -> float:
    """Return ``extra_memory`` with an allocator that returns large blocks at once, so that the system sees each."""
    command = [sys.executable, __file__, *argv, "--memory-of", line]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=["kd", "delta_kd"])
    parser.add_argument("--forms", nargs="+", default=["chunked"], choices=list(FORMS))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--student-width", type=int, default=256)
    parser.add_argument("--teacher-width", type=int, default=256)
    parser.add_argument("--chunk-size", type=int, help="default: chosen by the memory budget")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    options = parse(argv)
    lines = [options.memory_of] if options.memory_of else [f"{n} {f}" for n in options.losses for f in options.forms]
    losses = {line.split()[0]: make_loss(line.split()[0]) for line in lines}
    roles = sorted({STUDENT}.union(*(loss.requires for loss in losses.values())))
    widths = (options.student_width, options.teacher_width)
    dtype = getattr(torch, options.dtype)
    heads = make_heads(roles, options.tokens, options.vocabulary, *widths, dtype, options.device)
    labels = torch.randint(options.vocabulary, (options.tokens,), generator=torch.Generator().manual_seed(1))
    labels = labels.to(options.device)
    runs = {line: make_run(line, losses[line.split()[0]], heads, labels, options.chunk_size) for line in lines}
    if options.memory_of:
        print(extra_memory(runs[options.memory_of]))
        return
    seconds = fastest(runs, options.rounds)
    own = options.device == "cpu"
    memory = {line: extra_memory_in_own_process(line, argv) if own else extra_memory(runs[line]) for line in lines}
    floors = {} if own else {line: floor(losses[line.split()[0]], heads, dtype) for line in lines}
    first = lines[0]
    shown = {k: v for k, v in vars(options).items() if k not in ("losses", "forms", "memory_of")}
    table = Table(title=" ".join(f"{key}={value}" for key, value in shown.items()))
    for column in (
        "loss",
        "form",
        "heads",
        "seconds",
        "ratio",
        "extra MiB",
        "ratio",
        *(["of floor"] if floors else []),
    ):
        table.add_column(column, justify="left" if column in ("loss", "form") else "right")
    for line in lines:
        cells = (f"{seconds[line]:.3f}", f"{seconds[line] / seconds[first]:.2f}")
        cells += (f"{memory[line]:.1f}", f"{memory[line] / memory[first]:.2f}")
        cells += (f"{seconds[line] / floors[line]:.2f}",) if floors else ()
        table.add_row(*line.split(), str(1 + len(losses[line.split()[0]].requires)), *cells)
    Console(width=120).print(table)


def make_run(
    line: str, loss: Loss, heads: Mapping[str, Head], labels: Tensor, chunk_size: int | None
) -> Callable[[], None]:
    """Return a function that runs forward and backward of ``<loss> <form>``."""
    used = {role: heads[role] for role in (STUDENT, *sorted(loss.requires))}
    return lambda: FORMS[line.split()[1]](loss, used, labels, chunk_size)


def chunked(loss: Loss, heads: Mapping[str, Head], labels: Tensor, chunk_size: int | None) -> None:
    """Run the form that trains."""
    total, _ = chunked_loss(loss, heads, labels, chunk_size)
    torch.autograd.grad(total, [heads[STUDENT].hidden, heads[STUDENT].weight])


def plain(loss: Loss, heads: Mapping[str, Head], labels: Tensor, chunk_size: int | None) -> None:
    """Compute all logits, and gradients by autograd."""
    with torch.no_grad():
        logits = {role: head.logits() for role, head in heads.items() if role != STUDENT}
    logits[STUDENT] = heads[STUDENT].logits()
    total = loss(logits, labels).per_token.sum()
    torch.autograd.grad(total, [heads[STUDENT].hidden, heads[STUDENT].weight])


@torch.no_grad()
def products(loss: Loss, heads: Mapping[str, Head], labels: Tensor, chunk_size: int | None) -> None:
    """Multiply every head by its hidden states, and run the two products of the student's gradient."""
    size = chunk_size or 256
    used = {role: head.upcast() for role, head in heads.items()}
    student = used[STUDENT]
    weight_gradient_VD = torch.zeros_like(student.weight)
    logits_NV = torch.empty(size, len(student.weight), device=student.weight.device)
    for start in range(0, len(labels), size):
        stop = min(start + size, len(labels))
        for head in used.values():
            torch.mm(head.rows(start, stop).hidden.float(), head.weight.T, out=logits_NV[: stop - start])
        gradient_NV = logits_NV[: stop - start]
        torch.mm(gradient_NV, student.weight)
        weight_gradient_VD.addmm_(gradient_NV.T, student.hidden[start:stop].float())


def liger(loss: Loss, heads: Mapping[str, Head], labels: Tensor, chunk_size: int | None) -> None:
    """Run Liger's fused linear JSD at beta 0: the forward KL of two heads, whatever the loss."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    student, teacher = heads[STUDENT], heads["teacher"]
    value = LigerFusedLinearJSD(jsd_beta=0.0)(student.hidden, student.weight, teacher.hidden, teacher.weight, labels)
    torch.autograd.grad(value, [student.hidden, student.weight])


def floor(loss: Loss, heads: Mapping[str, Head], dtype: torch.dtype) -> float:
    """Return the seconds that no implementation can beat on this machine.

    They are the loss's products at the matrix rate or its bytes at the bandwidth, whichever takes longer; both rates
    are measured here.
    """
    used = [heads[role] for role in (STUDENT, *sorted(loss.requires))]
    products = [2 * len(head) * head.weight.numel() for head in used]
    operations = sum(products) + 2 * products[0]
    size = 4096
    a, b = (torch.randn(size, size, device=used[0].hidden.device).to(dtype) for _ in range(2))
    large = torch.empty(2**28, dtype=torch.uint8, device=a.device)
    best = fastest({"matrix": lambda: torch.mm(a, b), "copy": lambda: large.clone()}, 20)
    # Every head and its hidden states read once, the student's gradients written once.
    numbers = sum(head.weight.numel() + head.hidden.numel() for head in used)
    numbers += heads[STUDENT].weight.numel() + heads[STUDENT].hidden.numel()
    return max(operations * best["matrix"] / (2 * size**3), numbers * a.itemsize * best["copy"] / (2 * large.numel()))


FORMS: dict[str, Callable[..., None]] = {"chunked": chunked, "plain": plain, "products": products, "liger": liger}


if __name__ == "__main__":
    main(sys.argv[1:])
