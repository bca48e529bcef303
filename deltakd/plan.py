"""Estimates before anything is rented: ``python -m deltakd.plan --paper``, or with the overrides of a training run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console

from deltakd.cli import guarded, make_parser, parse
from deltakd.config.compose import compose_config
from deltakd.io.console import make_console
from deltakd.io.errors import ConfigError

USAGE = """Estimate memory, floating-point operations and bytes moved in an optimiser step, without any weights.

  python -m deltakd.plan experiment=delta_kd_gpt2 strategy=deepspeed_zero2 trainer.devices=8
  python -m deltakd.plan --student qwen2.5-1.5b --teacher qwen2.5-7b --gpus 2,4 --strategies fsdp+shard,ddp
  python -m deltakd.plan --paper --tflops 400 --interconnect 50 --tokens 1e9

The first form is a run as deltakd.train would start it; it reads the models' configurations. The others read none:
--student and --teacher are a name (qwen2.5-0.5b, 1.5b, 3b, 7b, 14b, 32b, 72b) or '{model_type: ..., vocab_size: ...}';
overrides (data.batch_size=2, loss=kd, ...) say the rest. A strategy is one of conf/strategy, with +shard, +replicate
or +cached for the references.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("plan", USAGE)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for deltakd.train")
    parser.add_argument("--paper", action="store_true", help="72B teachers, 7B and 1.5B students, on 8, 16 and 64 GPUs")
    parser.add_argument("--student", help="architecture of student and raw student")
    parser.add_argument("--teacher", help="architecture of teacher and raw teacher")
    parser.add_argument("--gpus", type=_counts, help="how many: 8,16")
    parser.add_argument("--strategies", help="deepspeed_zero3+shard,ddp (default: sensible ones)")
    parser.add_argument("--gpu-memory", type=_positive, default=80.0, metavar="GiB", help="of one GPU (80)")
    parser.add_argument("--tflops", type=_positive, help="TFLOP/s that a GPU really reaches; without it no hours")
    parser.add_argument("--interconnect", type=_positive, metavar="GB/s", help="that a GPU sends")
    parser.add_argument("--bandwidth", type=_positive, metavar="GB/s", help="that a GPU reads from its memory")
    parser.add_argument("--steps", type=_count, help="optimiser steps of the run")
    parser.add_argument("--tokens", type=_positive, help="positions of the run, all GPUs together, in place of --steps")
    given = parse(parser, argv)
    guarded(lambda: plan(given, make_console()), "")


def plan(given: argparse.Namespace, console: Console) -> None:
    """Print what was asked for.

    Raises:
        ValueError: options that do not go together, or a config or an architecture that can't be.
    """
    sizes = given.paper or given.student or given.teacher
    _check(given, bool(sizes))
    # A dry run: asked in a job of another size it is no run of that job.
    cfg = None if sizes else compose_config("train", [*given.overrides, "trainer.dry_run=true"])
    # This imports torch; --help and a mistyped key should not wait for it. The models follow once the config is right.
    from deltakd.config.build import make_settings

    settings = None if cfg is None else make_settings(cfg)
    from deltakd.estimates.clusters import PAPER, assumed, default_ways, make_cases, read_architecture, read_ways
    from deltakd.estimates.memory import planned_setting
    from deltakd.estimates.plan_tables import Rates, show_cases, show_setting

    rates = Rates(given.tflops, given.interconnect, given.bandwidth, given.steps, given.tokens)
    if settings is not None:
        if rates.steps is None and rates.tokens is None and settings.trainer.max_steps:
            rates = replace(rates, steps=settings.trainer.max_steps)
        show_setting(settings.name, planned_setting(settings), rates, console)
        return
    students, teacher, gpus = PAPER if given.paper else ((given.student,), given.teacher, given.gpus)
    ways = read_ways(given.strategies) if given.strategies else default_ways()
    teacher_name, teacher_shape = read_architecture(teacher, "--teacher")
    for student in students:
        name, shape = read_architecture(student, "--student")
        cases = make_cases(shape, teacher_shape, given.gpus or gpus, ways, given.overrides)
        setting = cases[0].setting
        title = f"{name} learns from {teacher_name}: {setting.positions:,} positions a micro-batch, {setting.precision}"
        show_cases(title, cases, assumed(given.overrides), given.gpu_memory, rates, console)


def _check(given: argparse.Namespace, sizes: bool) -> None:
    problems = []
    if given.paper and (given.student or given.teacher):
        problems.append("--paper names the models; leave --student and --teacher out")
    if sizes and not given.paper and not (given.student and given.teacher and given.gpus):
        problems.append("--student, --teacher and --gpus go together; give all three, or --paper")
    if not sizes and (given.gpus or given.strategies):
        problems.append(
            "--gpus and --strategies go with --student and --teacher; a training run has trainer.devices=8 strategy=..."
        )
    if given.steps and given.tokens:
        problems.append("--steps and --tokens are both given; give one")
    if given.tflops is None and (given.interconnect or given.bandwidth or given.steps or given.tokens):
        problems.append("hours need --tflops, what a GPU really reaches")
    if problems:
        raise ConfigError(problems)


def _number(text: str, kind: Callable[[str], float], what: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not value > 0 or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} above 0")
    return value


def _positive(text: str) -> float:
    return _number(text, float, "a number")


def _count(text: str) -> int:
    return int(_number(text, int, "a whole number"))


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
