"""Batches of rollouts: a step's prompts, answered with the student's weights at the start of the step."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from deltakd.data.batches.loader import collate, saved_position
from deltakd.data.batches.sampler import StepSampler
from deltakd.data.encoding.encoded_set import Encoded, EncodedSet
from deltakd.generation.noise import NoiseKey
from deltakd.rollouts.engine import Engine, Request
from deltakd.rollouts.responses import Response, Round, answered, prompt_of
from deltakd.rollouts.settings import RolloutSettings
from deltakd.types import IGNORE_INDEX, Batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Row:
    """A row of a step, ready to train on; ``log_probs`` are its labels' at the time of sampling."""

    encoded: Encoded
    log_probs: Any = None


@final
class RolloutLoader:
    """One rank's micro-batches of the whole run, resumable.

    A step's prompts are a function of the seed. Its responses are written when its first micro-batch is asked for, or
    with those of ``settings.every`` steps at once. Then its rows are dealt out by length, and each batch carries the
    valid tokens of the whole step: no batch is made before all ranks know all responses.

    Responses are a function of the student's weights and the noise keys. A run that resumes at the start of a round
    writes the same ones again; a round in progress is saved in ``state_dict``.

    Args:
        encoded: tokenised rows; only their prompts are read where the student answers.
        sampler: chooses the prompts of each step; its batches play no part.
        engine: answers the prompts.
        settings: of the rollouts.
        pad_id: as for ``collate``.
        batch_size: rows per rank and micro-batch.
        accumulate: micro-batches per optimiser step.
        rank, world_size: this rank's place.
        seed: for the noise, and for the choice of rows if not all responses are the student's.
    """

    def __init__(
        self,
        encoded: EncodedSet,
        sampler: StepSampler,
        engine: Engine,
        settings: RolloutSettings,
        *,
        pad_id: int,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.encoded = encoded
        self.sampler = sampler
        self.engine = engine
        self.settings = settings
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        #: ``rollout/...`` metrics of the current step.
        self.metrics: dict[str, float] = {}
        #: Seconds spent on responses by this process.
        self.seconds = 0.0
        self._start = 0
        self._position = 0
        self._round: Round | None = None

    def __len__(self) -> int:
        return self.sampler.total_steps * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        rows: list[_Row] = []
        dealt, step_tokens = -1, 0
        for index in range(self._start, len(self)):
            step, number = divmod(index, self.accumulate)
            if step != dealt:
                rows, dealt = self._rows(step), step
                step_tokens = _valid_tokens(rows)
            start = (number * self.world_size + self.rank) * self.batch_size
            batch = self._batch(rows[start : start + self.batch_size], step, step_tokens)
            # Set before the batch is handed over: a checkpoint saved while the caller holds it counts it as consumed.
            self._position = index + 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return ``position``, the number of micro-batches handed over, and the round if later steps need it."""
        following = self._position // self.accumulate
        begun = self._round is not None and following in self._round and following != self._round.first_step
        return {"position": self._position, "round": self._round.state_dict() if self._round and begun else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after ``position`` micro-batches. Raises ValueError if the run is shorter."""
        self._start = self._position = saved_position(state, len(self))
        self._round = None if state["round"] is None else Round.from_state(state["round"])

    def tokens_of_step(self, step: int) -> int:
        """Return the number of tokens that the student wrote for a step of the current round, over all ranks."""
        assert self._round is not None
        return sum(len(response.tokens) for response in self._round.responses(step))

    def responses_of_step(self, step: int) -> list[tuple[Encoded, Response]]:
        """Return the responses of a step of the current round, over all ranks, each with its row from the data."""
        assert self._round is not None
        places = zip(self.sampler.rows_of_step(step), self._is_own(step), strict=True)
        asked = [self.encoded[int(place)] for place, own in places if own for _ in range(self.settings.per_prompt)]
        return list(zip(asked, self._round.responses(step), strict=True))

    def _rows(self, step: int) -> list[_Row]:
        """Return the rows of a step over all ranks, shortest first."""
        if self._round is None or step not in self._round:
            self._round = self._answer(step)
        self.metrics |= self._round.metrics_of(step)
        responses = iter(self._round.responses(step))
        rows = []
        for place, own in zip(self.sampler.rows_of_step(step), self._is_own(step), strict=True):
            row = self.encoded[int(place)]
            if not own:
                rows.append(_Row(row))
                continue
            for _ in range(self.settings.per_prompt):
                response = next(responses)
                rows.append(_Row(answered(row.row_id, prompt_of(row), response), response.log_probs))
        return sorted(rows, key=lambda row: len(row.encoded.input_ids))

    def _answer(self, step: int) -> Round:
        """Write the responses of the round that begins with ``step``."""
        started = time.perf_counter()
        until = min(step - step % self.settings.every + self.settings.every, self.sampler.total_steps)
        by_step = [self._requests(one) for one in range(step, until)]
        responses = iter(self.engine.answer([request for requests in by_step for request in requests]))
        self.metrics |= self.engine.metrics
        made = Round(step, [[next(responses) for request in requests for _ in request.keys] for requests in by_step])
        seconds = time.perf_counter() - started
        self.seconds += seconds
        tokens = sum(len(response.tokens) for responses in made.steps for response in responses)
        self.metrics["rollout/tokens_per_second"] = tokens / max(seconds, 1e-9)
        _warn_if_empty([response for responses in made.steps for response in responses], step)
        return made

    def _requests(self, step: int) -> list[Request]:
        rows = self.sampler.rows_of_step(step)
        chosen = [self.encoded[int(place)] for place, own in zip(rows, self._is_own(step), strict=True) if own]
        # Step 0 in a key means "not in training", so training steps count from 1.
        return [
            Request(
                prompt_of(row),
                [NoiseKey(self.seed, row.row_id, step + 1, number) for number in range(self.settings.per_prompt)],
            )
            for row in chosen
        ]

    def _is_own(self, step: int) -> np.ndarray:
        """Return [prompts] bool: True where the student answers; the same share of every step."""
        count = self.sampler.rows_per_step
        own = np.arange(count) < round(self.settings.fraction * count)
        # The 3 keeps these draws apart from those of the order.
        return np.random.Generator(np.random.PCG64([self.seed, step, 3])).permutation(own)

    def _batch(self, rows: Sequence[_Row], step: int, step_tokens: int) -> Batch:
        batch = collate([row.encoded for row in rows], self.pad_id, step, step_tokens)
        if any(row.log_probs is not None for row in rows):
            batch.sampled_log_probs = _aligned(rows, batch.labels)
        return batch


def _valid_tokens(rows: Sequence[_Row]) -> int:
    """Return the number of trained tokens in all rows; nothing predicts position 0."""
    return sum(label != IGNORE_INDEX for row in rows for label in row.encoded.labels[1:])


def _aligned(rows: Sequence[_Row], labels_BT: Tensor) -> Tensor:
    """Return [B, T] float32: the log-prob of each label, 0 where there is none."""
    log_probs_BT = torch.zeros(labels_BT.shape)
    for number, row in enumerate(rows):
        log_probs_BT[number, labels_BT[number] != IGNORE_INDEX] = torch.from_numpy(row.log_probs)
    return log_probs_BT


def _warn_if_empty(responses: Sequence[Response], step: int) -> None:
    if responses and all(response.finished and len(response.tokens) == 1 for response in responses):
        log.warning(
            "All %d responses for optimiser step %d are empty: the student ends at once. Train it on given responses "
            "first (loss=sft), or check data.template.",
            len(responses),
            step,
        )
