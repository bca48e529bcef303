"""Which losses of the delta family can be trained, and with which treatment of the shift.

    python experiments/loss_stability/stability.py --trained head       # all, about 20 minutes on two cores
    python experiments/loss_stability/stability.py --trained body
    python experiments/loss_stability/stability.py --worlds unseen_token --losses delta_kd parallel_ratio

For each invented world (worlds.py), loss and treatment, without cross-entropy (ce_weight = 0), from the raw student on:
the norm of the gradient of the mean loss to what is trained, at the start; the share of the loss's target mass on
tokens to which the teacher gives less than 1e-5; and the held-out KL to the delta(1) target and to the teacher before
and after fifty AdamW steps, at the best of three learning rates (the one that ends with the lowest KL to the delta(1)
target: a loss that fails at all three can't be tuned). What is trained is the student's head, where each token has
weights of its own, or a linear body before it, through which all tokens have to go. Prints Markdown tables and writes
results_<trained>.json beside itself.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from worlds import World, heavy_tail, unseen_token

from deltakd.config.compose import compose_config
from deltakd.kernels import chunked_loss
from deltakd.losses import Distillation, ForwardKL, delta_target, teacher_target
from deltakd.types import STUDENT, Head, HeadLogits, Loss

WORLDS = {"unseen_token": unseen_token, "heavy_tail": heavy_tail}
TREATMENTS: dict[str, dict[str, Any]] = {
    "none": {"mask": None},
    "centre": {"mask": None, "centre": "teacher"},
    "clip 3": {"mask": None, "clip": 3.0},
    "centre, clip 3": {"mask": None, "centre": "teacher", "clip": 3.0},
    "mask 0.1": {"mask": 0.1},
    "mask 0.001": {"mask": 0.001},
}
LOSSES = (
    "kd",
    "delta_kd",
    "delta_kd_reverse",
    "delta_kd_skew",
    "delta_shift",
    "delta_bilinear",
    "delta_multi_teacher",
    "parallelogram",
    "parallel_ratio",
    "parallel_cross",
    "parallel_logit",
    "kd_plus_delta",
    "signed_parallelogram",
    "signed_parallelogram unsafe=true",
)
LEARNING_RATES = (1e-3, 1e-2, 1e-1)
STEPS, TOKENS, CHUNK = 50, 64, 64


@dataclass(frozen=True)
class Result:
    """One line of the table; KLs in nats per token over the held-out contexts."""

    trained: str
    world: str
    loss: str
    treatment: str
    gradient_norm: float
    tail_mass: float | None
    learning_rate: float
    delta_kl_before: float
    delta_kl: float
    teacher_kl_before: float
    teacher_kl: float


def make_loss(name: str, treatment: Mapping[str, Any]) -> Loss | None:
    """Return a ready-made loss without cross-entropy under a treatment; None if it has nothing to treat."""
    name, _, option = name.partition(" ")
    overrides = ["data.train=none", f"loss={name}", "loss.ce_weight=0"]
    config: Any = OmegaConf.to_container(
        compose_config("train", [*overrides, *([f"loss.{option}"] if option else [])]).loss, resolve=True
    )
    places = [node for node in (config, config.get("target", {}), config.get("matching", {})) if "treatment" in node]
    if not places and treatment != TREATMENTS["none"]:
        return None
    for node in places:
        node["treatment"] |= treatment
    loss: Loss = instantiate(config, _convert_="all")
    return loss


def tail_mass(name: str, loss: Loss, world: World) -> float | None:
    """Mean share of the target's mass on tokens with a teacher probability below 1e-5; None where there is no target.

    The target is found through the loss itself: under forward KL the gradient to the student's logits is student minus
    target. For the others it is that of the same loss with forward KL in place of its divergence.
    """
    if name.startswith(("parallel_logit", "kd_plus_delta")) or "unsafe" in name:
        return None
    if isinstance(loss, Distillation):
        loss = Distillation(loss.target, ForwardKL(), ce_weight=0.0)
    heads = {r: h.rows(0, 32) for r, h in world.heads(world.held_out, world.untrained("head")).items()}
    student_NV = heads[STUDENT].logits().requires_grad_()
    logits = HeadLogits(student_NV, {role: head for role, head in heads.items() if role != STUDENT})
    output = loss(logits, torch.zeros(len(student_NV), dtype=torch.long))
    (gradient_NV,) = torch.autograd.grad(output.per_token.sum(), student_NV)
    # A ratio loss compares on a support, and relative to a model: its own student side has its own softmax.
    own_NV = student_NV.detach().softmax(-1)
    if name.startswith("parallel_"):
        own_NV = _ratio_side(loss, logits, student_NV.detach())
    target_NV = own_NV - gradient_NV
    share = float((target_NV * (logits["teacher"].softmax(-1) < 1e-5)).sum(-1).mean())
    # A difference of probabilities: nothing may come out as a little less than nothing.
    return max(0.0, share)


def _ratio_side(loss: Any, logits: HeadLogits, student_NV: Tensor) -> Tensor:
    matching = loss.matching
    over_NV = logits[matching.over].log_softmax(-1)
    ratio_NV = student_NV.log_softmax(-1) - over_NV
    left_out_NV = matching.treatment.implausible({"teacher": logits["teacher"].log_softmax(-1)})
    return (ratio_NV if left_out_NV is None else ratio_NV.masked_fill(left_out_NV, -math.inf)).softmax(-1)


def mean_loss(loss: Loss, world: World, contexts_ND: Tensor, parameter: Tensor) -> Tensor:
    """Return the mean loss in nats per token."""
    heads: dict[str, Head] = world.heads(contexts_ND, parameter)
    total, _ = chunked_loss(loss, heads, torch.zeros(len(contexts_ND), dtype=torch.long), CHUNK)
    return total / len(contexts_ND)


@torch.no_grad()
def held_out_kl(world: World, parameter: Tensor) -> tuple[float, float]:
    """Return the KL to the delta(1) target and to the teacher."""
    losses = [Distillation(target, ForwardKL(), ce_weight=0.0) for target in (delta_target(1.0), teacher_target())]
    to_delta, to_teacher = (float(mean_loss(loss, world, world.held_out, parameter)) for loss in losses)
    return to_delta, to_teacher


def train(loss: Loss, world: World, trained: str, learning_rate: float) -> Tensor:
    """Run fifty AdamW steps from the raw student and return the trained tensor."""
    parameter = world.untrained(trained).requires_grad_()
    optimizer = torch.optim.AdamW([parameter], lr=learning_rate, weight_decay=0.0)
    for step in range(STEPS):
        start = step * TOKENS % len(world.train)
        optimizer.zero_grad()
        value = mean_loss(loss, world, world.train[start : start + TOKENS], parameter)
        value.backward()
        optimizer.step()
        if not torch.isfinite(value):
            break
    return parameter.detach()


def study(world_name: str, world: World, name: str, treatment: str, trained: str) -> Result | None:
    """Return one line of the table, or None if the treatment does not apply."""
    loss = make_loss(name, TREATMENTS[treatment])
    if loss is None:
        return None
    parameter = world.untrained(trained).requires_grad_()
    (gradient,) = torch.autograd.grad(mean_loss(loss, world, world.train[:TOKENS], parameter), parameter)
    before = held_out_kl(world, parameter.detach())
    ends = {rate: held_out_kl(world, train(loss, world, trained, rate)) for rate in LEARNING_RATES}
    finite = {rate: end for rate, end in ends.items() if math.isfinite(end[0])}
    best = min(finite or ends, key=lambda rate: ends[rate][0])
    mass = tail_mass(name, loss, world)
    end = ends[best]
    return Result(
        trained, world_name, name, treatment, float(gradient.norm()), mass, best, before[0], end[0], before[1], end[1]
    )


def markdown(results: Sequence[Result]) -> str:
    """Return the results of one world as a Markdown table."""
    lines = [
        "| loss | treatment | gradient norm | tail mass | learning rate | KL to delta(1) | KL to teacher |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        mass = "" if r.tail_mass is None else f"{100 * r.tail_mass:.2f} %"
        verdict = "" if r.delta_kl < r.delta_kl_before else " ✗"
        lines.append(
            f"| {r.loss} | {r.treatment} | {r.gradient_norm:.3g} | {mass} | {r.learning_rate:g} | "
            f"{r.delta_kl_before:.3f} → {r.delta_kl:.3f}{verdict} | {r.teacher_kl_before:.3f} → {r.teacher_kl:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    parser.add_argument("--treatments", nargs="+", default=list(TREATMENTS), choices=list(TREATMENTS))
    parser.add_argument("--trained", default="head", choices=["head", "body"])
    parser.add_argument("--output", type=Path, help="default: results_<trained>.json beside this script")
    options = parser.parse_args()
    output = options.output or Path(__file__).with_name(f"results_{options.trained}.json")
    results: list[Result] = []
    for world_name in options.worlds:
        world = WORLDS[world_name]()
        for name in options.losses:
            for treatment in options.treatments:
                started = time.perf_counter()
                result = study(world_name, world, name, treatment, options.trained)
                if result is not None:
                    results.append(result)
                    print(f"{result} ({time.perf_counter() - started:.0f} s)", flush=True)
                    output.write_text(json.dumps([asdict(r) for r in results], indent=1), encoding="utf-8")
    for world_name in options.worlds:
        print(f"\n### {world_name}\n\n{markdown([r for r in results if r.world == world_name])}")


if __name__ == "__main__":
    main()
