"""Schedules of the learning rate: what transformers would refuse in training is told from the config."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.trainer_utils import SchedulerType

from deltakd.training.optim import PLAIN_SCHEDULES, AdamW


def rates(optim: AdamW, steps: int = 10) -> list[float]:
    """The learning rate of each step."""
    optimizer, scheduler = optim.build(nn.Linear(2, 2), steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", PLAIN_SCHEDULES)
def test_a_plain_schedule_trains_without_options(schedule: str) -> None:
    optim = AdamW(lr=0.1, schedule=schedule, warmup_steps=0.2)
    assert optim.problems() == []
    assert max(rates(optim)) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", [*SchedulerType, "cosine_with_min"])
@pytest.mark.parametrize("options", [{}, {"min_lr_rate": 0.1}, {"num_cycles": 1}, {"num_decay_steps": 2}])
def test_a_schedule_is_refused_exactly_where_transformers_refuses_it(schedule: str, options: dict[str, Any]) -> None:
    optim = AdamW(schedule=getattr(schedule, "value", schedule), schedule_options=options)
    refusal = None
    try:
        optim.build(nn.Linear(2, 2), 10)
    except (ValueError, TypeError) as error:
        refusal = f"optim.schedule={optim.schedule} with optim.schedule_options={options}: {error}"
    assert optim.problems() == ([] if refusal is None else [refusal])


def test_a_fused_optimiser_takes_the_same_steps_and_reads_the_state_of_a_plain_one() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    other = copy.deepcopy(layer)
    optim = AdamW(lr=1e-2, schedule="constant", warmup_steps=0)
    (plain, _), (fused, _) = optim.build(layer, 10), optim.build(other, 10, fused=True)
    for step in range(3):
        for parameter, same in zip(layer.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.full_like(parameter, 0.1 * (step - 1))
            same.grad = parameter.grad.clone()
        plain.step()
        fused.step()
        for parameter, same in zip(layer.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter, same)
    fused.load_state_dict(plain.state_dict())
    fused.step()
