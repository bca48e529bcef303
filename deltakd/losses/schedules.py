"""Numbers inside a loss that change with training: the delta weight and TAID's interpolation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, SupportsFloat, final

from deltakd.types import Progress, Schedule

#: A number that may change with training, as the config gives it: a number, or {schedule, from, to, steps}.
ScheduleSetting = float | Mapping[str, Any] | Schedule

_SHAPES = ("constant", "linear", "cosine")
_KEYS = ("schedule", "from", "to", "steps")


@final
class Constant:
    """The same number for the whole run.

    Args:
        value: finite.
        name: the config key, for the message.

    Raises:
        ValueError: the value is not a finite number.
    """

    def __init__(self, value: float, name: str) -> None:
        self.value = _finite(value, name)

    def on_step(self, progress: Progress, reduced_loss: SupportsFloat) -> None:
        """Nothing to move."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


@final
class Ramp:
    """From one number to another along a line or half a cosine; then it stays there.

    Optimiser step k (from 0) uses the value at fraction k / steps.

    Args:
        shape: ``linear`` or ``cosine``.
        start: the value in the first optimiser step.
        end: the value from optimiser step ``steps`` on.
        steps: optimiser steps from start to end; None: the whole run.
        name: the config key, for messages.

    Raises:
        ValueError: a number is not finite, or ``steps`` is not a whole number from 1.
    """

    def __init__(self, shape: str, start: float, end: float, steps: int | None, name: str) -> None:
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"{name}.steps is {steps!r}; it must be a whole number of optimiser steps from 1, or null")
        self._cosine = shape == "cosine"
        self.start, self.end = _finite(start, f"{name}.from"), _finite(end, f"{name}.to")
        self._steps = steps
        self.value = self.start

    def on_step(self, progress: Progress, reduced_loss: SupportsFloat) -> None:
        """Move to the value of the coming step."""
        way = min(1.0, progress.step / (self._steps or progress.total_steps))
        if self._cosine:
            way = (1 - math.cos(math.pi * way)) / 2
        # The end is exact: start + 1 · (end − start) may differ from it by rounding.
        self.value = self.end if way == 1.0 else self.start + way * (self.end - self.start)

    def state_dict(self) -> dict[str, Any]:
        """The value of the coming step."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@final
class AdaptiveInterpolation:
    """TAID's u: from ``start`` to ``end``, never slower than a straight line, faster while the loss falls.

    With J the loss of an optimiser step: m ← βm + (1 − β)(J_before − J)/J_before, and
    u ← min(end, max(line, u + rate · σ(m) · (1 − u))) (arXiv 2501.16937, algorithm 1). Here J is the whole reduced
    loss, cross-entropy included.

    Args:
        start: u of the first step, in [0, 1).
        end: the largest u, in (start, 1].
        rate: the paper's α, the step size, in [0, 1].
        momentum: the paper's β, in [0, 1).

    Raises:
        ValueError: a setting is out of range; all of them are named.
    """

    def __init__(self, start: float = 0.4, end: float = 1.0, rate: float = 5e-4, momentum: float = 0.99) -> None:
        problems = []
        if not 0 <= start < 1:
            problems.append(f"loss.target.start is {start}; it must be at least 0 and below 1")
        if not start < end <= 1:
            problems.append(f"loss.target.end is {end}; it must be above start ({start}) and at most 1")
        if not 0 <= rate <= 1:
            problems.append(f"loss.target.rate is {rate}; it must be between 0 and 1")
        if not 0 <= momentum < 1:
            problems.append(f"loss.target.momentum is {momentum}; it must be at least 0 and below 1")
        if problems:
            raise ValueError("; ".join(problems))
        self.start, self.end = start, end
        self._rate, self._beta = rate, momentum
        self._momentum = 0.0
        self._loss_before: float | None = None
        self.value = float(start)

    def on_step(self, progress: Progress, reduced_loss: SupportsFloat) -> None:
        """Move u by how much the loss fell."""
        line = self.start + (self.end - self.start) * progress.step / progress.total_steps
        step, loss = 0.0, float(reduced_loss)
        if self._loss_before is not None and self._loss_before > 0:
            fall = (self._loss_before - loss) / self._loss_before
            self._momentum = self._beta * self._momentum + (1 - self._beta) * fall
            step = self._rate / (1 + math.exp(-max(self._momentum, -700.0))) * (1 - self.value)
        self._loss_before = loss
        self.value = min(self.end, max(line, self.value + step))

    def state_dict(self) -> dict[str, Any]:
        """u, the momentum, and the loss of the step before."""
        return {"value": self.value, "momentum": self._momentum, "loss_before": self._loss_before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]
        self._momentum = state["momentum"]
        self._loss_before = state["loss_before"]


def make_schedule(setting: ScheduleSetting, name: str) -> Schedule:
    """Make a schedule of a number, or of ``{schedule: linear, from: 0, to: 1, steps: 500}``.

    Args:
        setting: what the config gives.
        name: its config key, for messages.

    Raises:
        ValueError: a key is unknown or missing, or a number is not finite.
    """
    if isinstance(setting, Schedule):
        return setting
    if not isinstance(setting, Mapping):
        return Constant(setting, name)
    shape = setting.get("schedule")
    unknown = sorted(set(setting) - set(_KEYS))
    if shape not in _SHAPES or unknown:
        raise ValueError(
            f"{name} is {dict(setting)}; give a number, or a mapping with schedule ({', '.join(_SHAPES)}), from, to "
            f"and steps (null: the whole run), such as {name}={{schedule: linear, from: 0, to: 1, steps: 500}}"
        )
    if shape == "constant" and set(setting) - {"schedule", "from"}:
        raise ValueError(f"{name} is {dict(setting)}; a constant schedule has no to and no steps: it stays at from")
    needed = ("from",) if shape == "constant" else ("from", "to")
    missing = [key for key in needed if key not in setting]
    if missing:
        raise ValueError(f"{name} is {dict(setting)}; a {shape} schedule also needs {' and '.join(missing)}")
    if shape == "constant":
        return Constant(setting["from"], f"{name}.from")
    return Ramp(shape, setting["from"], setting["to"], setting.get("steps"), name)


def at_least(minimum: float, schedule: Schedule, name: str) -> Schedule:
    """Return the schedule, which must never fall below ``minimum``.

    Raises:
        ValueError: it does fall below.
    """
    lowest = min(ends_of(schedule))
    if lowest < minimum:
        raise ValueError(f"{name} is {lowest}; for this loss it must be at least {minimum:g}")
    return schedule


def ends_of(schedule: Schedule) -> tuple[float, ...]:
    """Return the numbers between which a schedule stays; of a schedule of the user's, the current one."""
    if isinstance(schedule, Ramp | AdaptiveInterpolation):
        return (schedule.start, schedule.end)
    return (schedule.value,)


def is_zero(schedule: Schedule) -> bool:
    """True if it is 0 for the whole run."""
    return isinstance(schedule, Constant) and schedule.value == 0.0


def moving(**schedules: Schedule) -> dict[str, Schedule]:
    """Return the schedules that are not constant, by name, as a loss reports them in ``schedules``."""
    return {name: schedule for name, schedule in schedules.items() if not isinstance(schedule, Constant)}


def _finite(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number")
    return float(value)
