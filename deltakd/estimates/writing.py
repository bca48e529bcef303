"""The cost of the responses that a student writes while it trains: key-value cache, operations, bytes read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deltakd.data import InstructionData
from deltakd.estimates.layout import Layout
from deltakd.estimates.sizes import Skeleton
from deltakd.generation.key_values import ROOM
from deltakd.training.settings import StepSettings
from deltakd.types import TEACHER

#: Tensors of [rows, V] in float32 that choosing a token holds at once, for each model that is asked.
_LOGITS = 3


@dataclass(frozen=True)
class Writing:
    """The responses that one rank writes for an optimiser step with the student in memory.

    All are taken as long as they may be. Where old responses are trained on again, half are taken as new, which is the
    mean over a run; where the student's share of rows adapts, it is taken to be ``rollout.fraction``, its upper bound.

    Args:
        responses: of one rank per optimiser step.
        per_prompt: responses that share a prompt, which is run once.
        batch: most rows decoded together.
        prompt, response: tokens of the longest.
        every: optimiser steps per round.
        mixes_teacher: the teacher decodes beside the student.
        scored: log-probs of the tokens are computed afterwards.
    """

    responses: float
    per_prompt: int
    batch: int
    prompt: int
    response: int
    every: int
    mixes_teacher: bool
    scored: bool

    @classmethod
    def of(cls, settings: StepSettings) -> Writing | None:
        """Return what a run's student writes; None if it writes nothing, or a server does."""
        rollout, data = settings.rollout, settings.data
        if not rollout.on_policy or rollout.engine != "own":
            return None
        if data.batch_size is None or not isinstance(data, InstructionData):
            return None  # said to be wrong where a run is checked
        rows = data.batch_size * settings.trainer.accumulate_grad_batches / (2 if settings.loss.needs_pairs else 1)
        most = rows * rollout.fraction
        responses = most * (0.5 if rollout.replay.size else 1.0)
        response = min(rollout.decoding.max_new_tokens, data.max_length - 1)
        return cls(
            responses=responses,
            per_prompt=rollout.per_prompt,
            # All are new until the store of old ones is full.
            batch=max(1, min(rollout.batch_size, math.ceil(most * rollout.every))),
            prompt=max(1, min(data.max_prompt_length, data.max_length - response)),
            response=response,
            every=rollout.every,
            mixes_teacher=rollout.mixes_teacher,
            scored=rollout.needs_ratios and settings.loss.needs_sampled_tokens,
        )

    @property
    def tokens(self) -> float:
        """Tokens that one rank writes for an optimiser step."""
        return self.responses * self.response

    @property
    def steps(self) -> float:
        """Steps of the decoder for an optimiser step, the rounds of a round's last rows included."""
        return math.ceil(self.responses * self.every / self.batch) * self.response / self.every

    def cache_bytes(self, model: Skeleton, itemsize: int) -> int:
        """Return the bytes of a model's key-value cache while a whole batch is decoded, spare columns included."""
        return self.batch * (self.prompt + self.response + ROOM) * token_bytes(model, itemsize)

    def logits_bytes(self, model: Skeleton) -> int:
        """Return the bytes of what choosing a batch's tokens computes from a model's logits."""
        return _LOGITS * 4 * self.batch * len(model.head)

    def operations(self, model: Skeleton) -> float:
        """Return the operations by which one rank's responses for an optimiser step are written.

        Each prompt is run once. A token then takes 2 per weight, 4 per number of its query and key before it, and the
        head.
        """
        prompts = self.responses / self.per_prompt
        start = prompts * (model.forward_flops(self.prompt, self.prompt) + 2 * model.head.numel())
        body = model.forward_flops(1, 0) + 2 * model.head.numel()
        # The last token is not run; token j (from 0) attends to the prompt and to the tokens before it, and itself.
        later = self.response - 1
        attended = later * self.prompt + later * (later + 1) / 2
        return start + self.responses * (later * body + attended * model.forward_flops_of_attention(1, 1))

    def scoring_operations(self, model: Skeleton) -> float:
        """Return the operations for the log-probs of the responses."""
        if not self.scored:
            return 0.0
        row = self.prompt + self.response
        return self.responses * (model.forward_flops(row, row) + 2 * self.response * model.head.numel())

    def bytes_read(self, model: Skeleton, itemsize: int) -> float:
        """Return the bytes read from memory to decode: all weights and half the full cache at each step."""
        return self.steps * (model.weight_bytes + self.cache_bytes(model, itemsize) / 2)


def token_bytes(model: Skeleton, itemsize: int) -> int:
    """Return the bytes of one token's keys and values in all layers; sliding windows hold fewer tokens."""
    config: Any = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(width) * itemsize


def gathered_bytes(layout: Layout, model: Skeleton, is_reference: bool) -> int:
    """Return the bytes of a model that each rank holds whole to write with, where it holds a part otherwise."""
    shards = layout.shards_references if is_reference else layout.shards_student
    return model.weight_bytes if shards else 0


#: The role that writes with the student in a mixture.
PARTNER = TEACHER
