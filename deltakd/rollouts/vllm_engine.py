"""The engine that lets a vLLM server answer, with the student's weights at the start of the round."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import final

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from deltakd.data.batches.loader import collate
from deltakd.distributed.one_rank import by_rank_zero
from deltakd.distributed.sharding import gathered, place
from deltakd.generation.model_step import end_tokens
from deltakd.generation.noise import NoiseKey
from deltakd.io.errors import LostServerError, RefusedError, ServerError
from deltakd.io.inference_server import InferenceServer
from deltakd.kernels import label_log_probs
from deltakd.models import LanguageModel
from deltakd.models.checkpoint_weights import checkpoint_weights
from deltakd.models.vocabulary import head_rows
from deltakd.rollouts.engine import Request
from deltakd.rollouts.responses import Response, answered
from deltakd.rollouts.settings import RolloutSettings
from deltakd.rollouts.vllm_server import Completions, ServerFacts, make_transfer, read_facts
from deltakd.rollouts.weight_transfer import Transfer
from deltakd.types import device_of

log = logging.getLogger(__name__)

#: Seconds between two looks for a lost server.
_POLL_SECONDS = 1.0


@final
class VllmEngine:
    """Answers through a vLLM server: rank 0 hands the weights over and asks; all ranks get all responses.

    Rank 0 alone, since the server spreads requests over its own GPUs anyway: so one process holds the connection, the
    weights and the verdict on a failure, and no rank can know other responses than the others.

    If the server is lost in the middle of a round, rank 0 waits for it, hands the weights over again, and asks for the
    whole round again: a server that was restarted has its first weights, and it can't be told which responses it wrote
    since. The seeds are the same, and so are the responses.

    Args:
        whole_student: yields the student in eval mode, whole on this rank; collective.
        tokenizer: its EOS ends responses, like those of the student's generation config.
        settings: of the rollouts.
        vocabulary: V.
        longest: most tokens of prompt and response together.
        log_probs: keep the server's log-probs of the tokens.
        directory: for weights files.
    """

    def __init__(
        self,
        whole_student: Callable[[], AbstractContextManager[LanguageModel]],
        tokenizer: PreTrainedTokenizerBase,
        settings: RolloutSettings,
        vocabulary: int,
        longest: int,
        log_probs: bool,
        directory: Path,
    ) -> None:
        assert settings.vllm.url is not None, "checked with the config"
        #: ``rollout/...`` metrics of the last round.
        self.metrics: dict[str, float] = {}
        self._whole_student = whole_student
        self._tokenizer = tokenizer
        self._settings = settings
        self._vocabulary = vocabulary
        self._longest = longest
        self._log_probs = log_probs
        self._directory = directory
        self._server = InferenceServer(
            settings.vllm.url, timeout=settings.vllm.timeout, connections=settings.batch_size
        )
        self._facts: ServerFacts | None = None
        self._transfer: Transfer | None = None
        self._run = secrets.token_hex(4)
        self._rounds = 0
        self._transfer_seconds = 0.0

    @torch.no_grad()
    def answer(self, requests: Sequence[Request]) -> list[Response]:
        """As for ``Engine``.

        Raises:
            ServerError: the server is lost for longer than ``rollout.vllm.wait``, does not do what it is asked, or
                answers with another model than the student.
        """
        with self._whole_student() as student:
            responses, seconds = by_rank_zero(lambda: self._round(student, requests))
            prompts = [request.prompt for request in requests for _ in request.keys]
            gap = self._gap(student, prompts, responses)
        self.metrics = {"rollout/transfer_seconds": seconds}
        if gap is not None:
            self.metrics["rollout/logprob_gap"] = gap
            self._check(gap)
        if self._log_probs:
            return responses
        return [Response(response.tokens, response.finished) for response in responses]

    def _round(self, student: LanguageModel, requests: Sequence[Request]) -> tuple[list[Response], float]:
        """Return all responses, and the seconds that handing over took; on rank 0."""
        jobs = [(request.prompt, key) for request in requests for key in request.keys]
        until: float | None = None
        self._rounds += 1
        while True:
            found: list[Response | None] = [None] * len(jobs)
            try:
                seconds = self._hand_over(student)
                self._ask(student, jobs, found)
                return [response for response in found if response is not None], seconds
            except LostServerError as error:
                until = until or time.monotonic() + self._settings.vllm.wait
                done = sum(response is not None for response in found)
                self._await_server(error, until, f"{done} of {len(jobs)} responses of the round were there")

    @torch.no_grad()
    def _hand_over(self, student: LanguageModel) -> float:
        """Give the server the student's weights, awake and with an empty prefix cache; return the seconds."""
        started = time.perf_counter()
        if self._transfer is None:
            self._facts = read_facts(self._server, self._settings.vllm.model)
        assert self._facts is not None
        if self._facts.sleeps:
            # Its weights first: memory for the cache comes once the transfer needs none.
            self._server.post("/wake_up", tags="weights")
        try:
            if self._transfer is None:
                self._transfer = make_transfer(self._server, self._facts, self._settings.vllm, self._directory)
                self._transfer.connect()
            self._transfer.send(checkpoint_weights(student), self._facts.dtype, self._version)
        except RefusedError:
            if self._server.is_healthy():
                raise
            raise LostServerError(f"the server {self._server.url} died while it took the weights") from None
        if self._facts.sleeps:
            self._server.post("/wake_up", tags="kv_cache")
        # Requests that an earlier, killed run left there must not keep blocks of the former weights.
        answer = self._server.post("/reset_prefix_cache", reset_running_requests=True)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise LostServerError(
                f"the server {self._server.url} did not empty its prefix cache: requests still hold it"
            )
        return time.perf_counter() - started

    @property
    def _version(self) -> str:
        return f"deltakd-{self._run}-{self._rounds}"

    def _ask(
        self, student: LanguageModel, jobs: Sequence[tuple[Sequence[int], NoiseKey]], found: list[Response | None]
    ) -> None:
        """Fill in the responses."""
        assert self._facts is not None
        completions = Completions(
            self._server,
            self._facts.model.name,
            self._settings.decoding,
            sorted(end_tokens(student.causal_lm, self._tokenizer)),
            self._vocabulary,
            head_rows(student.causal_lm.config) or self._vocabulary,
            self._longest,
        )

        def fill(number: int) -> None:
            prompt, key = jobs[number]
            try:
                found[number] = completions.answer(prompt, key)
            except RefusedError as error:
                # An engine that died answers 500 until its server has noticed.
                if error.status >= 500:
                    raise LostServerError(str(error)) from None
                raise

        pool = ThreadPoolExecutor(self._settings.batch_size, thread_name_prefix="vllm")
        try:
            for done in [pool.submit(fill, number) for number in range(len(jobs))]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)
        self._check_version()
        if self._facts.sleeps:
            self._server.post("/sleep", level=2)

    def _check_version(self) -> None:
        """Raise a LostServerError if the server's weights were replaced in the meantime."""
        version = self._server.get("/weight_info")["weight_version"]
        if version != self._version:
            raise LostServerError(
                f"the server {self._server.url} has other weights than it was given ({version!r}): it was restarted, "
                "or another run uses it, too"
            )

    def _await_server(self, error: LostServerError, until: float, progress: str) -> None:
        """Wait until the server works again. Raises LostServerError if it does not in time."""
        self._transfer = None
        so_far = f"{error}; {progress}"
        if time.monotonic() < until:
            log.warning("%s. Waiting for it (rollout.vllm.wait=%g s).", so_far, self._settings.vllm.wait)
        while time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            if self._server.is_healthy():
                log.info("The server %s is back.", self._server.url)
                return
        raise LostServerError(
            f"{so_far}, and it did not come back within rollout.vllm.wait={self._settings.vllm.wait:g} s"
        )

    def _gap(
        self, student: LanguageModel, prompts: Sequence[Sequence[int]], responses: Sequence[Response]
    ) -> float | None:
        """Return the mean |log π_server − log π| of a token, over some responses spread over the round.

        None if none is to be checked. Collective: call on every rank.
        """
        count = min(self._settings.vllm.checked, len(responses))
        if not count:
            return None
        rank, world_size = place()
        chosen = np.linspace(0, len(responses) - 1, count).astype(int)[rank::world_size]
        sums = np.zeros(2)
        for number in chosen:
            response = responses[number]
            batch = collate([answered(0, prompts[number], response)], 0, 0, 0).to(device_of(student))
            own_N = label_log_probs(student.head(batch), batch.labels_N).float().cpu().numpy()
            assert response.log_probs is not None
            sums += np.abs(own_N - response.log_probs).sum(), len(own_N)
        total, tokens = np.sum(gathered(sums), axis=0)
        return float(total / tokens)

    def _check(self, gap: float) -> None:
        bound = self._settings.vllm.max_logprob_gap
        if gap <= bound:
            return
        raise ServerError(
            f"rollout/logprob_gap is {gap:.3g} nats a token, above rollout.vllm.max_logprob_gap={bound:g}: the server "
            f"{self._server.url} does not answer with the student's weights. It may have failed to load them, round in "
            "another dtype (start it with the --dtype that the student trains in), or scale its rotary embedding "
            "differently; raise the bound only if you know why they differ"
        )
