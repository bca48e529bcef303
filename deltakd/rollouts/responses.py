"""Responses of one round, and how they become rows to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deltakd.data.encoding.encoded_set import Encoded, flatten
from deltakd.data.encoding.images import RowImages
from deltakd.types import IGNORE_INDEX


@dataclass(frozen=True)
class Response:
    """A response written by the student.

    Args:
        tokens: its tokens, including the EOS that ended it.
        finished: True if an EOS ended it.
        log_probs: [tokens] float32 nats, of each token when it was sampled, at temperature 1; None: not requested.
    """

    tokens: list[int]
    finished: bool
    log_probs: NDArray[np.float32] | None = None


def pack(responses: Sequence[Response]) -> dict[str, Any]:
    """Return responses as a few tensors, for a checkpoint."""
    tokens, offsets = flatten([response.tokens for response in responses])
    log_probs = [r.log_probs for r in responses if r.log_probs is not None]
    return {
        "tokens": torch.from_numpy(tokens),
        "offsets": torch.from_numpy(offsets),
        "finished": [response.finished for response in responses],
        "log_probs": torch.from_numpy(np.concatenate(log_probs)) if log_probs else None,
    }


def unpack(state: dict[str, Any]) -> list[Response]:
    """Return the responses that ``pack`` was given."""
    tokens, offsets = state["tokens"].tolist(), state["offsets"].tolist()
    log_probs = None if state["log_probs"] is None else state["log_probs"].numpy()
    return [
        Response(tokens[start:stop], finished, None if log_probs is None else log_probs[start:stop])
        for start, stop, finished in zip(offsets[:-1], offsets[1:], state["finished"], strict=True)
    ]


@dataclass(frozen=True)
class StepPlan:
    """Who answers the prompts of a step, fixed when its round begins.

    Args:
        own: prompts whose responses are the student's.
        fresh: how many of them are answered for this step; the others' rows are kept responses of earlier steps.
    """

    own: int
    fresh: int


@dataclass(frozen=True)
class Round:
    """The responses for one or more optimiser steps.

    Args:
        first_step: the first of the steps.
        plans: for each step, who answers.
        steps: each step's new responses, in the order of its requests.
    """

    first_step: int
    plans: list[StepPlan]
    steps: list[list[Response]]

    def __contains__(self, step: int) -> bool:
        return self.first_step <= step < self.first_step + len(self.steps)

    def plan(self, step: int) -> StepPlan:
        """Return who answers in a step of the round."""
        return self.plans[step - self.first_step]

    def responses(self, step: int) -> list[Response]:
        """Return the new responses of a step of the round."""
        return self.steps[step - self.first_step]

    def state_dict(self) -> dict[str, Any]:
        """Return the round as a few tensors, for a checkpoint."""
        return {
            "first_step": self.first_step,
            "plans": [(plan.own, plan.fresh) for plan in self.plans],
            "sizes": [len(step) for step in self.steps],
            "responses": pack([response for step in self.steps for response in step]),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Round:
        """Return the round that ``state_dict`` came from."""
        remaining = iter(unpack(state["responses"]))
        steps = [[next(remaining) for _ in range(size)] for size in state["sizes"]]
        return cls(state["first_step"], [StepPlan(*plan) for plan in state["plans"]], steps)

    def metrics_of(self, step: int) -> dict[str, float]:
        """Return a step's mean response length in tokens, and the share of responses that ended with EOS."""
        every = self.responses(step)
        return (
            {}
            if not every
            else {
                "rollout/response_length": float(np.mean([len(response.tokens) for response in every])),
                "rollout/finished_fraction": float(np.mean([response.finished for response in every])),
            }
        )


class Prompts(NamedTuple):
    """What comes before a response.

    Args:
        own: the student's tokens.
        other: the teachers', if they have a tokenizer of their own.
    """

    own: list[int]
    other: list[int] | None


def prompts_of(row: Encoded) -> Prompts:
    """Return the tokens before a row's last response; all of them if it has none.

    With two tokenizers, it is the last response that neither side cut off.
    """
    if row.other is None:
        return Prompts(_before(row, _starts(row)), None)
    starts = [_starts(row), _starts(row.other)]
    common = min(map(len, starts))
    return Prompts(_before(row, starts[0][:common]), _before(row.other, starts[1][:common]))


def prompt_of(row: Encoded) -> list[int]:
    """Return the student's part of ``prompts_of``."""
    return prompts_of(row).own


def _starts(row: Encoded) -> list[int]:
    """Return where each response of a row begins."""
    trained = [label != IGNORE_INDEX for label in row.labels]
    return [place for place, here in enumerate(trained) if here and not (place and trained[place - 1])]


def _before(row: Encoded, starts: Sequence[int]) -> list[int]:
    return row.input_ids[: starts[-1]] if starts else row.input_ids


def answered(
    row_id: int,
    prompt: Sequence[int],
    response: Response,
    route: int | None = None,
    images: RowImages | None = None,
) -> Encoded:
    """Return the row that trains the student on its own response; ``route`` and ``images`` are as of an ``Encoded``."""
    labels = [IGNORE_INDEX] * len(prompt) + response.tokens
    return Encoded([*prompt, *response.tokens], labels, row_id, route, images=images)


def last_response(row: Encoded) -> Encoded:
    """Return the row with its last response as the only one that is trained."""
    start = len(prompt_of(row))
    return replace(row, labels=[IGNORE_INDEX] * start + list(row.labels[start:]))
