"""The engine that answers prompts with the student itself, using the evaluation's generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deltakd.data.batches.loader import collate
from deltakd.data.encoding.images import RowImages, read_images
from deltakd.distributed.sharding import gathered, place
from deltakd.generation.generator import Sampled, sample
from deltakd.generation.model_step import Mixture, end_tokens, mixed_log_probs
from deltakd.generation.noise import NoiseKey
from deltakd.kernels import label_log_probs
from deltakd.models import LanguageModel
from deltakd.models.tokenizers import pad_id
from deltakd.rollouts.responses import Response, answered
from deltakd.rollouts.settings import RolloutSettings
from deltakd.types import Batch, device_of


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Args:
        prompt: its tokens.
        keys: one noise key per response, made of row, step and response number.
        images: of the prompt; None: it has none.
    """

    prompt: Sequence[int]
    keys: Sequence[NoiseKey]
    images: RowImages | None = None


class Engine(Protocol):
    """Answers prompts with the student's current weights.

    Attributes:
        metrics: ``rollout/...`` of the last round.
    """

    metrics: dict[str, float]

    def answer(self, requests: Sequence[Request]) -> list[Response]:
        """Return the responses, request by request and key by key. Collective: call on every rank."""
        ...


@final
class OwnEngine:
    """Answers with the student in memory; the ranks share the prompts, and each gets all responses.

    Args:
        whole_student: yields the student in eval mode, whole on this rank; collective.
        whole_teacher: yields the teacher likewise, if tokens are drawn from a mixture of both; else None.
        tokenizer: its EOS ends responses, like those of the student's generation config.
        settings: of the rollouts.
        vocabulary: V.
        longest: most tokens of prompt and response together.
        log_probs: also return the log-probs of the tokens.
    """

    def __init__(
        self,
        whole_student: Callable[[], AbstractContextManager[LanguageModel]],
        tokenizer: PreTrainedTokenizerBase,
        settings: RolloutSettings,
        vocabulary: int,
        longest: int,
        log_probs: bool,
        whole_teacher: Callable[[], AbstractContextManager[LanguageModel]] | None = None,
    ) -> None:
        self.metrics: dict[str, float] = {}
        self._whole_student = whole_student
        self._whole_teacher = whole_teacher
        self._tokenizer = tokenizer
        self._settings = settings
        self._vocabulary = vocabulary
        self._longest = longest
        self._log_probs = log_probs

    @torch.no_grad()
    def answer(self, requests: Sequence[Request]) -> list[Response]:
        """As for ``Engine``. In float32 on CPUs, responses do not depend on the number of ranks."""
        rank, world_size = place()
        # Prompts of similar length go to different ranks, which balances their work.
        order = np.argsort([-len(request.prompt) for request in requests], kind="stable")
        mine = [int(number) for number in order[rank::world_size]]
        with self._whole_student() as student, self._lent_teacher() as teacher:
            own = self._own_part(student, teacher, [requests[number] for number in mine])
        found: dict[int, list[Response]] = {}
        for part in gathered(dict(zip(mine, own, strict=True))):
            found |= part
        return [response for number in range(len(requests)) for response in found[number]]

    def _lent_teacher(self) -> AbstractContextManager[LanguageModel | None]:
        return nullcontext() if self._whole_teacher is None else self._whole_teacher()

    def _own_part(
        self, student: LanguageModel, teacher: LanguageModel | None, requests: list[Request]
    ) -> list[list[Response]]:
        answers = sample(
            student.hf,
            [request.prompt for request in requests],
            [request.keys for request in requests],
            decoding=self._settings.decoding,
            batch_size=self._settings.batch_size,
            eos_ids=end_tokens(student.hf, self._tokenizer),
            vocab_size=self._vocabulary,
            pad_id=pad_id(self._tokenizer, self._vocabulary),
            longest=self._longest,
            static_cache=self._settings.static_cache,
            mixture=None if teacher is None else Mixture(teacher.hf, self._settings.teacher_weight),
            images=None if all(request.images is None for request in requests) else partial(_read_images, requests),
        )
        return [
            [self._response(student, teacher, request, one) for one in own]
            for request, own in zip(requests, answers, strict=True)
        ]

    def _response(
        self, student: LanguageModel, teacher: LanguageModel | None, request: Request, answer: Sampled
    ) -> Response:
        response = Response(answer.tokens, answer.finished)
        if not self._log_probs:
            return response
        # One row at a time, so its log-probs depend on neither batching nor ranks.
        batch = collate([answered(0, request.prompt, response, images=request.images)], 0, 0, 0)
        log_probs_N = _label_log_probs(student, batch)
        if teacher is not None:
            with torch.autocast(device_of(teacher).type, enabled=False):
                of_teacher_N = _label_log_probs(teacher, batch)
            log_probs_N = mixed_log_probs(log_probs_N, of_teacher_N, self._settings.teacher_weight)
        return Response(answer.tokens, answer.finished, log_probs_N.numpy())


def _read_images(requests: Sequence[Request], places: Sequence[int]) -> dict[str, Tensor] | None:
    """Return the tensors of the images of some prompts."""
    return read_images((requests[place].images, requests[place].prompt) for place in places)


def _label_log_probs(model: LanguageModel, batch: Batch) -> Tensor:
    """Return the labels' log-probs, [N] float32 on the CPU."""
    moved = batch.to(device_of(model))
    return label_log_probs(model.head(moved), moved.labels_N).float().cpu()
