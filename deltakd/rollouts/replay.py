"""Responses of earlier steps, trained on again, and an adaptive share of the student's (DistiLLM, arXiv 2402.03898)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, final

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from deltakd.data.encoding.encoded_set import flatten
from deltakd.rollouts.responses import Prompts, Response, pack, unpack

#: Progress of the run, from 0 to 1 -> share of the student's rows that are written anew.
_FRESH = {"decreasing": lambda t: 1.0 - t, "constant": lambda t: 0.5, "increasing": lambda t: t}


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """What becomes of responses after their step, and whether their share adapts (arXiv 2402.03898).

    Args:
        size: the newest responses that are kept; 0: none. Until so many are kept, all are written anew.
        fresh: the share of the student's rows that are written anew, the rest being kept ones, at progress t of the
            run: ``decreasing``: 1 − t, ``constant``: 1/2, ``increasing``: t.
        adaptive: the student's share of a step's rows begins at ``start``, and rises by ``rise`` up to
            ``rollout.fraction`` whenever the validation loss is ``tolerance`` or more above the last level; that loss
            is then the new level, and the first validation gives the first.
        start: share of a step's rows.
        rise: share of a step's rows.
        tolerance: nats per token, of ``val/ce``.
    """

    size: Annotated[int, Ge(0)] = 0
    fresh: Literal["decreasing", "constant", "increasing"] = "decreasing"
    adaptive: bool = False
    start: Annotated[float, Ge(0), Le(1)] = 0.0
    rise: Annotated[float, Gt(0), Le(1)] = 0.1
    tolerance: Annotated[float, Ge(0)] = 0.1

    def fresh_share(self, progress: float) -> float:
        """Return the share of the student's rows that are written anew."""
        return _FRESH[self.fresh](progress) if self.size else 1.0


@final
class StudentShare:
    """The share of a step's rows that are the student's; it may rise with the validation loss.

    Args:
        settings: how it moves, if it does.
        fraction: the share, or its upper bound.
    """

    def __init__(self, settings: ReplaySettings, fraction: float) -> None:
        self._settings = settings
        self._fraction = fraction
        self._level: float | None = None
        self.value = settings.start if settings.adaptive else fraction

    def after_validation(self, loss: float) -> None:
        """Move after a validation whose cross-entropy was ``loss``, in nats per token, the same on every rank."""
        if not self._settings.adaptive:
            return
        if self._level is None:
            self._level = loss
        elif loss >= self._level + self._settings.tolerance:
            # Rounded, so that ten rises of 0.1 are 1.
            self.value = min(self._fraction, round(self.value + self._settings.rise, 9))
            self._level = loss

    def state_dict(self) -> dict[str, Any]:
        """Return the share and the level."""
        return {"value": self.value, "level": self._level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self._level = state["value"], state["level"]


@dataclass(frozen=True)
class Kept:
    """A response to train on again.

    Args:
        row_id: the prompt's row in the data.
        prompts: its tokens.
        response: with its log-probs when it was written, if a loss needs them.
        step: the optimiser step for which it was written, from 0.
        route: number of the pair of teachers that judges it; None: rows are not routed.
    """

    row_id: int
    prompts: Prompts
    response: Response
    step: int
    route: int | None = None


@final
class ReplayBuffer:
    """The newest responses of earlier steps; the same on every rank.

    Args:
        size: how many; 0: none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: list[Kept] = []

    def before(self, step: int) -> list[Kept]:
        """Return the kept responses that were written for steps before ``step``, oldest first."""
        earlier = [one for one in self._kept if one.step < step]
        return earlier[-self.size :] if self.size else []

    def add(self, step: int, made: Sequence[Kept]) -> None:
        """Add the responses written for a step; adding them again after a resume changes nothing."""
        if self.size:
            # Those of the step itself come on top: until the step is over, it may be dealt out once more.
            self._kept = [*self.before(step), *made]

    def draw(self, step: int, count: int, seed: int) -> list[Kept]:
        """Draw kept responses for a step, each at most once."""
        there = self.before(step)
        # The 4 keeps these draws apart from those of the order and of the rows that are the student's.
        chosen = np.random.Generator(np.random.PCG64([seed, step, 4])).choice(len(there), count, replace=False)
        return [there[place] for place in chosen]

    def state_dict(self) -> dict[str, Any]:
        """Return the buffer as a few tensors, for a checkpoint."""
        prompts, offsets = flatten([one.prompts.own for one in self._kept])
        others = [one.prompts.other for one in self._kept if one.prompts.other is not None]
        other_prompts, other_offsets = flatten(others)
        return {
            "row_ids": [one.row_id for one in self._kept],
            "steps": [one.step for one in self._kept],
            "routes": [one.route for one in self._kept],
            "prompts": torch.from_numpy(prompts),
            "offsets": torch.from_numpy(offsets),
            "other_prompts": torch.from_numpy(other_prompts),
            "other_offsets": torch.from_numpy(other_offsets),
            "responses": pack([one.response for one in self._kept]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = _split(state["prompts"], state["offsets"])
        others: Sequence[list[int] | None] = _split(state["other_prompts"], state["other_offsets"])
        others = others or [None] * len(own)
        prompts = map(Prompts, own, others)
        responses = unpack(state["responses"])
        columns = zip(state["row_ids"], prompts, responses, state["steps"], state["routes"], strict=True)
        self._kept = [Kept(*column) for column in columns]


def _split(flat: Tensor, offsets: Tensor) -> list[list[int]]:
    """Return the lists that ``flatten`` was given."""
    return [flat[start:stop].tolist() for start, stop in pairwise(offsets.tolist())]
