"""Numbers that change with training: their values step by step, and going on after a stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deltakd.losses import delta_target, taid_target
from deltakd.losses.schedules import AdaptiveInterpolation, is_zero, make_schedule
from deltakd.types import Progress, Schedule


def run(schedule: Schedule, total: int, losses: list[float] | None = None, start: int = 0) -> list[float]:
    """The value that each optimiser step uses, from step ``start`` to the one after the last."""
    values = [schedule.value]
    for step in range(start, total):
        schedule.on_step(Progress(step + 1, total), 1.0 if losses is None else losses[step])
        values.append(schedule.value)
    return values


@pytest.mark.parametrize("setting", [0.7, 2, {"schedule": "constant", "from": 0.7}], ids=str)
def test_constant(setting: float | dict[str, Any]) -> None:
    value = setting["from"] if isinstance(setting, dict) else setting
    assert run(make_schedule(setting, "delta_weight"), 5) == [value] * 6


@pytest.mark.parametrize(("steps", "total"), [(None, 8), (5, 8), (1, 3), (20, 8)])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.3, -0.2)])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_ramps(shape: str, start: float, end: float, steps: int | None, total: int) -> None:
    """Step k uses the value at k / steps of the way, and from there on the end, exactly."""
    schedule = make_schedule({"schedule": shape, "from": start, "to": end, "steps": steps}, "delta_weight")
    way = np.minimum(np.arange(total + 1) / (steps or total), 1.0)
    share = way if shape == "linear" else 0.5 - 0.5 * np.cos(np.pi * way)
    values = run(schedule, total)
    np.testing.assert_allclose(values, start + share * (end - start), rtol=0, atol=1e-15)
    assert values[0] == start
    assert all(value == end for value, w in zip(values, way, strict=True) if w == 1)


def taid(losses: list[float], start: float, end: float, rate: float, momentum: float) -> list[float]:
    """Algorithm 1 of arXiv 2501.16937: t of each iteration. Before the first loss there is no change to speak of."""
    total = len(losses)
    t, m, before = start, 0.0, None
    values = [t]
    for n, loss in enumerate(losses, 1):
        linear = start + (end - start) * n / total
        step = 0.0
        if before is not None:
            m = momentum * m + (1 - momentum) * (before - loss) / before
            step = rate / (1 + math.exp(-m)) * (1 - t)
        t = min(end, max(linear, t + step))
        before = loss
        values.append(t)
    return values


@pytest.mark.parametrize(
    "options",
    [
        {"start": 0.4, "end": 1.0, "rate": 5e-4, "momentum": 0.99},
        {"start": 0.4, "end": 1.0, "rate": 0.2, "momentum": 0.5},
        {"start": 0.0, "end": 0.8, "rate": 0.05, "momentum": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("total", [60, 3000])
def test_taid(options: dict[str, float], total: int) -> None:
    losses = list(np.random.default_rng(0).lognormal(size=total) * np.linspace(3, 0.5, total))
    values = run(AdaptiveInterpolation(**options), total, losses)
    np.testing.assert_allclose(values, taid(losses, **options), rtol=0, atol=1e-13)
    assert values == sorted(values)
    assert values[-1] == options["end"]
    # The default rate over few steps never leaves the line; else it runs ahead of it.
    line = np.linspace(options["start"], options["end"], total + 1)
    assert (np.array(values) >= line - 1e-15).all()
    if options["rate"] > 0.01:
        assert (values - line).max() > 0.05


def test_taid_survives_any_loss() -> None:
    """A loss of 0, a loss below 0, a fall or a rise by many orders of magnitude: u stays on its way."""
    losses = [1.0, 0.0, 1.0, 1e-300, 1e300, 5.0, -2.0, 3.0, 1e-9, 1.0]
    values = run(AdaptiveInterpolation(rate=0.3, momentum=0.5), len(losses), losses)
    assert values == sorted(values)
    assert all(0.4 <= value <= 1.0 for value in values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_schedule(0.5, "w"),
        lambda: make_schedule({"schedule": "linear", "from": 0, "to": 1, "steps": 30}, "w"),
        lambda: make_schedule({"schedule": "cosine", "from": 1, "to": 0, "steps": None}, "w"),
        lambda: AdaptiveInterpolation(rate=0.2, momentum=0.9),
    ],
    ids=["constant", "linear", "cosine", "taid"],
)
@pytest.mark.parametrize("stop", [0, 1, 17])
def test_a_stop_half_way_changes_nothing(make: Callable[[], Schedule], stop: int) -> None:
    total = 40
    losses = list(np.random.default_rng(1).lognormal(size=total))
    whole = run(make(), total, losses)
    first = make()
    for step in range(stop):
        first.on_step(Progress(step + 1, total), losses[step])
    second = make()
    second.load_state_dict(first.state_dict())
    assert run(second, total, losses, stop) == whole[stop:]


def test_zero_is_zero_for_the_whole_run() -> None:
    assert is_zero(make_schedule(0, "w"))
    assert is_zero(make_schedule({"schedule": "constant", "from": 0}, "w"))
    assert not is_zero(make_schedule({"schedule": "linear", "from": 0, "to": 1}, "w"))
    assert not is_zero(AdaptiveInterpolation(start=0.0))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (math.nan, r"^delta_weight is nan; it must be a finite number"),
        (None, r"^delta_weight is None; it must be a finite number"),
        (True, r"^delta_weight is True; it must be a finite number"),
        ("1", r"^delta_weight is '1'; it must be a finite number"),
        ({"schedule": "step", "from": 0, "to": 1}, r"^delta_weight is .*'step'.*schedule \(constant, linear, cosine\)"),
        ({"schedule": "linear", "form": 0, "to": 1}, r"^delta_weight is .*'form'.*from, to and steps"),
        ({"from": 0, "to": 1}, r"^delta_weight is .*a mapping with schedule \(constant, linear, cosine\)"),
        ({"schedule": "linear", "from": 0}, r"^delta_weight is .*; a linear schedule also needs to"),
        ({"schedule": "cosine"}, r"^delta_weight is .*; a cosine schedule also needs from and to"),
        ({"schedule": "constant"}, r"^delta_weight is .*; a constant schedule also needs from"),
        ({"schedule": "linear", "from": 0, "to": math.inf}, r"^delta_weight\.to is inf; it must be a finite number"),
        ({"schedule": "linear", "from": None, "to": 1}, r"^delta_weight\.from is None; it must be a finite number"),
        ({"schedule": "linear", "from": 0, "to": 1, "steps": 0}, r"^delta_weight\.steps is 0; .* from 1, or null"),
        ({"schedule": "linear", "from": 0, "to": 1, "steps": 2.5}, r"^delta_weight\.steps is 2\.5; .*whole number"),
    ],
    ids=str,
)
def test_errors(setting: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_target(setting)


def test_errors_of_taid_come_together() -> None:
    with pytest.raises(
        ValueError,
        match=r"target\.start is -0\.1; .*target\.end is 1\.5; .*target\.rate is 2; .*target\.momentum is 1; .*below 1",
    ):
        taid_target(-0.1, 1.5, 2, 1)
    with pytest.raises(ValueError, match=r"loss\.target\.end is 0\.4; it must be above start \(0\.4\) and at most 1"):
        taid_target(0.4, 0.4)
