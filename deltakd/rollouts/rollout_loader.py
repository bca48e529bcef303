"""Batches of rollouts: a step's prompts, answered with the student's weights at the start of the step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from deltakd.data.batches.ahead import begun_ahead
from deltakd.data.batches.loader import collate, image_row_of, saved_position
from deltakd.data.batches.sampler import StepSampler
from deltakd.data.encoding.encoded_set import Encoded, EncodedSet
from deltakd.data.encoding.images import RowImages
from deltakd.data.encoding.two_tokenizers import TwoTokenizers
from deltakd.generation.noise import NoiseKey
from deltakd.rollouts.engine import Engine, Request
from deltakd.rollouts.replay import Kept, ReplayBuffer, StudentShare
from deltakd.rollouts.responses import Response, Round, StepPlan, answered, last_response, prompt_of, prompts_of
from deltakd.rollouts.settings import RolloutSettings
from deltakd.types import IGNORE_INDEX, Batch, StepPairs

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
    writes the same ones again; a round in progress is saved in ``state_dict``, and so are the responses kept to be
    trained on again.

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
        pairs: each response of the student follows that of the data to the same prompt; the batch size is then even.
        tokenizers: encode the student's responses for teachers with a tokenizer of their own; None: they share the
            student's.
        prepare: called with each batch of a step, ``ahead`` of them before they are needed.
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
        pairs: bool = False,
        tokenizers: TwoTokenizers | None = None,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
        ahead: int = 0,
    ) -> None:
        self.encoded = encoded
        self.prepare = prepare
        self.ahead = ahead
        self.sampler = sampler
        self.engine = engine
        self.settings = settings
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self._image_row = image_row_of(encoded, world_size)
        self.seed = seed
        self.pairs = pairs
        self.tokenizers = tokenizers
        #: ``rollout/...`` metrics of the current step.
        self.metrics: dict[str, float] = {}
        self.buffer = ReplayBuffer(settings.replay.size)
        self.share = StudentShare(settings.replay, settings.fraction)
        self._speed: dict[str, float] = {}
        #: Seconds spent on responses by this process.
        self.seconds = 0.0
        self._start = 0
        self._position = 0
        self._round: Round | None = None

    def __len__(self) -> int:
        return self.sampler.total_steps * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        index = self._start
        while index < len(self):
            # No later step is begun: it needs the weights after this one.
            for batch in begun_ahead(self._batches(*divmod(index, self.accumulate)), self.ahead):
                index += 1
                # Set before the batch is handed over: a checkpoint saved while the caller holds it counts it as
                # consumed.
                self._position = index
                yield batch

    def _batches(self, step: int, first: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of a step, from number ``first``."""
        rows = self._rows(step)
        step_tokens = _valid_tokens(rows)
        pairs = StepPairs(len(rows) // 2, _valid_tokens(rows[::2])) if self.pairs else None
        for number in range(first, self.accumulate):
            start = (number * self.world_size + self.rank) * self.batch_size
            batch = self._batch(rows[start : start + self.batch_size], step, step_tokens)
            batch.pairs = pairs
            yield self.prepare(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return ``position``, the number of micro-batches handed over, and what later steps need of earlier ones."""
        following = self._position // self.accumulate
        begun = self._round is not None and following in self._round and following != self._round.first_step
        return {
            "position": self._position,
            "round": self._round.state_dict() if self._round and begun else None,
            "buffer": self.buffer.state_dict() if self.buffer.size else None,
            "share": self.share.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after ``position`` micro-batches. Raises ValueError if the run is shorter."""
        self._start = self._position = saved_position(state, len(self))
        self._round = None if state["round"] is None else Round.from_state(state["round"])
        if state["buffer"] is not None:
            self.buffer.load_state_dict(state["buffer"])
        self.share.load_state_dict(state["share"])

    def tokens_of_step(self, step: int) -> int:
        """Return the number of tokens that the student wrote for a step of the current round, over all ranks."""
        assert self._round is not None
        return sum(len(response.tokens) for response in self._round.responses(step))

    def responses_of_step(self, step: int) -> list[tuple[Encoded, Response]]:
        """Return the new responses for a step of the current round, over all ranks, each with its row from the data."""
        assert self._round is not None
        asked = [row for row, turn in self._turns(step) if turn < self._round.plan(step).fresh]
        asked = [row for row in asked for _ in range(self.settings.per_prompt)]
        return list(zip(asked, self._round.responses(step), strict=True))

    def _rows(self, step: int) -> list[_Row]:
        """Return the rows of a step over all ranks, shortest first."""
        if self._round is None or step not in self._round:
            self._round = self._answer(step)
        plan, each = self._round.plan(step), self.settings.per_prompt
        made = [Kept(row.row_id, prompts_of(row), one, step, row.route) for row, one in self.responses_of_step(step)]
        again = self.buffer.draw(step, (plan.own - plan.fresh) * each, self.seed)
        self.buffer.add(step, made)
        self.metrics = self._round.metrics_of(step) | self._speed | self._replay_metrics(step, again)
        own = self._own_rows([*made, *again])
        if self.pairs:
            given = [_Row(last_response(row)) for row, _ in self.responses_of_step(step)]
            return _shortest_first(zip(given, own, strict=True))
        given = [_Row(row) for row, turn in self._turns(step) if turn >= plan.own]
        return _shortest_first((row,) for row in (*own, *given))

    def _images(self, one: Kept) -> RowImages | None:
        return None if self.encoded.images is None else self.encoded.images.of_row(one.row_id)

    def _own_rows(self, kept: Sequence[Kept]) -> list[_Row]:
        """Return the rows that train on these responses of the student."""
        if self.tokenizers is None:
            return [
                _Row(
                    answered(one.row_id, one.prompts.own, one.response, one.route, self._images(one)),
                    one.response.log_probs,
                )
                for one in kept
            ]
        rows, broken = [], 0
        for one in kept:
            assert one.prompts.other is not None, "prompts are encoded in both tokenizers"
            asked = (one.prompts.own, one.prompts.other)
            made = self.tokenizers.answered(one.row_id, asked, one.response.tokens, one.response.finished)
            rows.append(_Row(made.row, one.response.log_probs))
            broken += not made.is_utf8
        self.metrics["rollout/invalid_utf8_fraction"] = broken / max(1, len(kept))
        return rows

    def _replay_metrics(self, step: int, again: Sequence[Kept]) -> dict[str, float]:
        found = {"rollout/student_fraction": self.share.value} if self.settings.replay.adaptive else {}
        if not self.settings.replay.size:
            return found
        age = {"rollout/replay_age": float(np.mean([step - one.step for one in again]))} if again else {}
        return found | age | {"rollout/replayed": float(len(again))}

    def _answer(self, step: int) -> Round:
        """Write the responses of the round that begins with ``step``."""
        started = time.perf_counter()
        until = min(step - step % self.settings.every + self.settings.every, self.sampler.total_steps)
        plans = [self._plan(one, len(self.buffer.before(step))) for one in range(step, until)]
        by_step = [self._requests(one, plan.fresh) for one, plan in zip(range(step, until), plans, strict=True)]
        asked = [request for requests in by_step for request in requests]
        responses = iter(self.engine.answer(asked) if asked else [])
        steps = [[next(responses) for request in requests for _ in request.keys] for requests in by_step]
        seconds = time.perf_counter() - started
        self.seconds += seconds
        every = [response for made in steps for response in made]
        tokens = sum(len(response.tokens) for response in every)
        self._speed = self.engine.metrics | {"rollout/tokens_per_second": tokens / max(seconds, 1e-9)} if every else {}
        _warn_if_empty(every, step)
        return Round(step, plans, steps)

    def _plan(self, step: int, kept: int) -> StepPlan:
        """Decide who answers the prompts of a step; ``kept`` responses are there when its round begins."""
        own = round(self.share.value * self.sampler.rows_per_step)
        if kept < self.settings.replay.size:
            return StepPlan(own, own)
        fresh = round(self.settings.replay.fresh_share(step / self.sampler.total_steps) * own)
        return StepPlan(own, max(fresh, own - kept // self.settings.per_prompt))

    def _requests(self, step: int, fresh: int) -> list[Request]:
        # Step 0 in a key means "not in training", so training steps count from 1.
        return [
            Request(
                prompt_of(row),
                [NoiseKey(self.seed, row.row_id, step + 1, number) for number in range(self.settings.per_prompt)],
                row.images,
            )
            for row, turn in self._turns(step)
            if turn < fresh
        ]

    def _turns(self, step: int) -> list[tuple[Encoded, int]]:
        """Return the rows of a step, each with its turn: first come those that the student answers, then the others."""
        count = self.sampler.rows_per_step
        # The 3 keeps these draws apart from those of the order.
        turns = np.random.Generator(np.random.PCG64([self.seed, step, 3])).permutation(count)
        rows = self.sampler.rows_of_step(step)
        return [(self.encoded[int(place)], int(turn)) for place, turn in zip(rows, turns, strict=True)]

    def _batch(self, rows: Sequence[_Row], step: int, step_tokens: int) -> Batch:
        batch = collate([row.encoded for row in rows], self.pad_id, step, step_tokens, image_row=self._image_row)
        if any(row.log_probs is not None for row in rows):
            batch.sampled_log_probs = _aligned(rows, batch.labels)
        return batch


def _shortest_first(groups: Iterable[tuple[_Row, ...]]) -> list[_Row]:
    """Return all rows, by the longest of each group; groups stay together."""
    ordered = sorted(groups, key=lambda group: max(len(row.encoded.input_ids) for row in group))
    return [row for group in ordered for row in group]


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
