"""The loss alone, forward and backward, at the public shape: H = 4,096, V = 128,256, 8,192 tokens, bfloat16.

Forms: ``ours`` is what trains; ``products`` does its matrix products in half precision and nothing else; ``liger`` is
Liger's fused linear JSD at beta 0 (forward KL of two heads), ``liger_chunked`` its chunked form; ``plain`` multiplies
all heads out and leaves the rest to autograd. ``of_floor`` is the distance from the longer of two times: operations at
the measured matrix rate, bytes at the measured bandwidth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, Results, peak_gib, rates, seconds_of
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from deltakd.config.compose import compose_config
from deltakd.kernels import KernelOptions, chunked_loss
from deltakd.types import STUDENT, Head, Loss


def loss_named(name: str) -> Loss:
    """Return a ready-made loss."""
    config = compose_config("train", ["data.train=none", f"loss={name}"])
    loss: Loss = instantiate(OmegaConf.to_container(config.loss, resolve=True), _convert_="all")
    return loss


def make_heads(options: argparse.Namespace, roles: list[str]) -> dict[str, Head]:
    """Return random heads whose logits have a standard deviation of about 3."""
    torch.manual_seed(0)
    heads = {}
    for role in roles:
        shapes = ((options.tokens, options.width), (options.vocabulary, options.width))
        hidden, weight = (torch.randn(shape, device=options.device, dtype=DTYPES[options.dtype]) for shape in shapes)
        weight.mul_(3 / options.width**0.5)
        heads[role] = Head(*(tensor.requires_grad_(role == STUDENT) for tensor in (hidden, weight)))
    return heads


def ours(loss: Loss, heads: Mapping[str, Head], labels: Tensor) -> None:
    total, _ = chunked_loss(loss, heads, labels)
    torch.autograd.grad(total, [heads[STUDENT].hidden, heads[STUDENT].weight])


def ours_without_triton(loss: Loss, heads: Mapping[str, Head], labels: Tensor) -> None:
    total, _ = chunked_loss(loss, heads, labels, options=KernelOptions(triton=False))
    torch.autograd.grad(total, [heads[STUDENT].hidden, heads[STUDENT].weight])


def plain(loss: Loss, heads: Mapping[str, Head], labels: Tensor) -> None:
    with torch.no_grad():
        logits = {role: head.logits() for role, head in heads.items() if role != STUDENT}
    logits[STUDENT] = heads[STUDENT].logits()
    torch.autograd.grad(loss(logits, labels).per_token.sum(), [heads[STUDENT].hidden, heads[STUDENT].weight])


@torch.no_grad()
def products(loss: Loss, heads: Mapping[str, Head], labels: Tensor, rows: int = 2048) -> None:
    """Every head times its hidden states, and the two products of the student's gradient."""
    student = heads[STUDENT]
    weight_gradient_VD = torch.zeros_like(student.weight)
    for start in range(0, len(labels), rows):
        some = slice(start, start + rows)
        for head in heads.values():
            z_NV = head.hidden[some] @ head.weight.T
        z_NV @ student.weight
        weight_gradient_VD.addmm_(z_NV.T, student.hidden[some])


def _liger(module: Any, heads: Mapping[str, Head], labels: Tensor) -> None:
    student, teacher = heads[STUDENT], heads["teacher"]
    value = module(student.hidden, student.weight, teacher.hidden, teacher.weight, labels)
    value = value[0] if isinstance(value, tuple) else value
    torch.autograd.grad(value, [student.hidden, student.weight])


def liger(loss: Loss, heads: Mapping[str, Head], labels: Tensor) -> None:
    from liger_kernel.transformers import LigerFusedLinearJSD

    _liger(LigerFusedLinearJSD(jsd_beta=0.0), heads, labels)


def liger_chunked(loss: Loss, heads: Mapping[str, Head], labels: Tensor) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    _liger(LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0), heads, labels)


FORMS: dict[str, Callable[[Loss, Mapping[str, Head], Tensor], None]] = {
    "ours": ours,
    "ours_without_triton": ours_without_triton,
    "products": products,
    "liger": liger,
    "liger_chunked": liger_chunked,
    "plain": plain,
}
#: Liger has two heads.
LINES = [("kd", form) for form in FORMS] + [("delta_kd", form) for form in FORMS if "liger" not in form]
#: The most informative first.
LINES.sort(key=lambda line: list(FORMS).index(line[1]))


def floor(heads: Mapping[str, Head], rate: Mapping[str, float]) -> float:
    """Return the seconds of the products' operations or the bytes that must move, whichever is longer."""
    each = [2 * len(head) * head.weight.numel() for head in heads.values()]
    operations = sum(each) + 2 * 2 * len(heads[STUDENT]) * heads[STUDENT].weight.numel()
    tensors = [t for head in heads.values() for t in (head.hidden, head.weight)]
    moved = sum(t.nbytes for t in tensors) + heads[STUDENT].hidden.nbytes + heads[STUDENT].weight.nbytes
    return max(operations / rate["tflops"] / 1e12, moved / rate["tb_per_s"] / 1e12)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    options = parser.parse_args()
    setting = {key: value for key, value in vars(options).items() if key != "out"}
    rate = rates(options.device, DTYPES[options.dtype])
    results = Results(options.out, "loss", setting | rate)
    losses = {name: loss_named(name) for name in ("kd", "delta_kd")}
    heads = make_heads(options, sorted({STUDENT}.union(*(loss.requires for loss in losses.values()))))
    labels = torch.randint(options.vocabulary, (options.tokens,), device=options.device)
    for name, form in LINES:
        used = {role: heads[role] for role in (STUDENT, *sorted(losses[name].requires))}

        def measure(name: str = name, form: str = form, used: dict[str, Head] = used) -> dict[str, Any]:
            def run() -> None:
                FORMS[form](losses[name], used, labels)

            seconds = seconds_of(run)
            return {
                "loss": name,
                "form": form,
                "heads": len(used),
                "ms": 1000 * seconds,
                "of_floor": seconds / floor(used, rate),
                "extra_gib": peak_gib(run),
                "weight_gradient_gib": used[STUDENT].weight.nbytes / 2**30,
            }

        results.attempt(f"{name} {form}", measure)


if __name__ == "__main__":
    main()
