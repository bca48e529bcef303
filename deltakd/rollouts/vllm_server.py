"""The user's vLLM server: what it is, and what a round of rollouts asks of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from deltakd.generation import Decoding
from deltakd.generation.noise import NoiseKey
from deltakd.io.errors import ConfigError, LostServerError, RefusedError, ServerError
from deltakd.io.inference_server import InferenceServer
from deltakd.models.server_model import ServedModel, architecture_problems, served_model, served_tokenizer_problems
from deltakd.rollouts.responses import Response
from deltakd.rollouts.vllm_settings import VllmSettings
from deltakd.rollouts.weight_transfer import FilesTransfer, NcclTransfer, Transfer

#: How to start a server.
HOW = "VLLM_SERVER_DEV_MODE=1 vllm serve <model.student.path>"
_MODEL_KEY = "rollout.vllm.model"


@dataclass(frozen=True)
class ServerFacts:
    """What a server says about itself.

    Args:
        model: the model it serves.
        dtype: of its weights; None: unknown here.
        backend: of its weight transfer; None: it was started without one.
        sleeps: True if it can free its memory while it has nothing to do.
        on_cpu: True if it computes on CPUs.
        exact_log_probs: True if its log-probs are those of the model at temperature 1, without the decoding options.
    """

    model: ServedModel
    dtype: torch.dtype | None
    backend: str | None
    sleeps: bool
    on_cpu: bool
    exact_log_probs: bool


def read_facts(server: InferenceServer, wanted: str | None) -> ServerFacts:
    """Ask a server what it is.

    Args:
        server: the server.
        wanted: the name of its model; None: the only one.

    Raises:
        LostServerError: it is not there.
        ValueError: it serves another model, is no vLLM, or has no development routes.
    """
    model = served_model(server, wanted, _MODEL_KEY)
    try:
        config = server.get("/server_info", config_format="json")["vllm_config"]
    except RefusedError as error:
        if error.status not in (401, 403, 404):
            raise
        raise ValueError(
            f"the server {server.url} has no development routes, by which it gets the student's weights; start it with "
            f"{HOW}"
        ) from None
    found, parallel = config["model_config"], config["parallel_config"]
    return ServerFacts(
        model,
        getattr(torch, str(found.get("dtype")).removeprefix("torch."), None),
        (config.get("weight_transfer_config") or {}).get("backend"),
        bool(found.get("enable_sleep_mode")),
        "cpu_worker" in str(parallel.get("worker_cls")),
        found.get("logprobs_mode") == "raw_logprobs",
    )


def check_server(
    settings: VllmSettings, tokenizer: PreTrainedTokenizerBase, student: PreTrainedConfig, longest: int
) -> None:
    """Compare a server with the run, before any weights are loaded; then let it sleep, if it can.

    Args:
        settings: name the server.
        tokenizer: the student's.
        student: its transformers config.
        longest: most tokens of prompt and response together.

    Raises:
        ConfigError: all problems, one sentence each.
    """
    assert settings.url is not None, "checked with the config"
    server = InferenceServer(settings.url, timeout=settings.timeout)
    try:
        facts = read_facts(server, settings.model)
        problems = _problems(server, facts, settings, tokenizer, student, longest)
    except LostServerError as error:
        raise ConfigError([f"rollout.vllm.url: {error}; start it: {HOW}"]) from None
    except ValueError as error:
        raise ConfigError([f"rollout.vllm.url: {error}"]) from None
    if problems:
        raise ConfigError([f"rollout.vllm.url: {problem}" for problem in problems])
    if facts.sleeps:
        server.post("/sleep", level=2)


def _problems(
    server: InferenceServer,
    facts: ServerFacts,
    settings: VllmSettings,
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedConfig,
    longest: int,
) -> list[str]:
    found = architecture_problems(server, facts.model, student)
    found += served_tokenizer_problems(server, facts.model, tokenizer)
    if facts.model.longest is not None and facts.model.longest < longest:
        found.append(
            f"the server {server.url} holds {facts.model.longest} tokens of prompt and response together, and "
            f"data.max_length is {longest}; start it with --max-model-len {longest}"
        )
    if not facts.exact_log_probs:
        found.append(
            f"the server {server.url} gives log-probs after its sampling options; start it without --logprobs-mode"
        )
    if settings.transfer == "nccl" and facts.backend != "nccl":
        found.append(
            f"rollout.vllm.transfer is nccl, and the server {server.url} was started without it; start it with "
            """--weight-transfer-config '{"backend": "nccl"}', or give rollout.vllm.transfer=files"""
        )
    if settings.transfer == "nccl" and not torch.cuda.is_available():
        found.append(
            "rollout.vllm.transfer is nccl, and this process has no CUDA GPU; give rollout.vllm.transfer=files"
        )
    if facts.on_cpu and getattr(student.get_text_config(decoder=True), "tie_word_embeddings", False):
        found.append(
            f"the server {server.url} computes on CPUs, where vLLM packs the output embedding once and does not renew "
            "it if it is tied to the input's, as the student's is; serve on a GPU, take a student with "
            "tie_word_embeddings=false, or give rollout.engine=own"
        )
    return found


def make_transfer(server: InferenceServer, facts: ServerFacts, settings: VllmSettings, directory: Path) -> Transfer:
    """Return the way in which weights get to a server.

    Args:
        server: the server.
        facts: what it is.
        settings: choose the way.
        directory: for files, if the settings name none.
    """
    if settings.transfer == "nccl" or (
        settings.transfer == "auto" and facts.backend == "nccl" and torch.cuda.is_available()
    ):
        return NcclTransfer(server, torch.device("cuda", torch.cuda.current_device()))
    return FilesTransfer(server, Path(settings.weights_dir or directory))


@final
class Completions:
    """Lets a server continue prompts, by token ids in both directions: nothing is tokenised twice.

    Args:
        server: the server.
        model: the name of its model.
        decoding: how tokens are chosen.
        ends: tokens that end a response.
        vocabulary: V; the server never chooses ids from here on.
        rows: rows of the model's output embedding.
        longest: most tokens of prompt and response together.
    """

    def __init__(
        self,
        server: InferenceServer,
        model: str,
        decoding: Decoding,
        ends: Sequence[int],
        vocabulary: int,
        rows: int,
        longest: int,
    ) -> None:
        self._server = server
        self._longest = longest
        self._max_new_tokens = decoding.max_new_tokens
        self._vocabulary = vocabulary
        # Every option is given: those left out would come from the served model's generation config.
        self._body: dict[str, Any] = {
            "model": model,
            "temperature": decoding.temperature if decoding.do_sample else 0.0,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # Ours alone: the server would add those of its own generation config.
            "ignore_eos": True,
            "stop_token_ids": list(ends),
            "logprobs": 0,
            "return_token_ids": True,
        }
        if rows > vocabulary:
            self._body["logit_bias"] = {str(unused): -100.0 for unused in range(vocabulary, rows)}

    def answer(self, prompt: Sequence[int], key: NoiseKey) -> Response:
        """Return one response, with the log-probs of its tokens.

        Args:
            prompt: tokens.
            key: gives the seed.

        Raises:
            LostServerError: the server is gone, or gave up on the response.
            RefusedError: it does not take the request.
            ServerError: it answers something else than was asked.
        """
        room = min(self._max_new_tokens, self._longest - len(prompt))
        body = self._body | {"prompt": list(prompt), "max_tokens": room, "seed": seed_of(key)}
        answer = self._server.post("/v1/completions", body)
        try:
            choice = answer["choices"][0]
            tokens, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            read, reason = choice["prompt_token_ids"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"the server {self._server.url} answers in another format: {str(answer)[:200]}") from None
        if reason == "abort":
            raise LostServerError(f"the server {self._server.url} gave up on a response: another client paused it")
        self._check(prompt, tokens, log_probs, read, reason)
        return Response(tokens, reason == "stop", np.asarray(log_probs, np.float32))

    def _check(self, prompt: Sequence[int], tokens: Any, log_probs: Any, read: Any, reason: Any) -> None:
        server = self._server.url
        if read != list(prompt):
            raise ServerError(f"the server {server} read another prompt than it was sent; is there a proxy before it?")
        if not tokens or log_probs is None or len(tokens) != len(log_probs) or reason not in ("stop", "length"):
            raise ServerError(
                f"the server {server} answered {len(tokens or ())} token ids with {len(log_probs or ())} log-probs and "
                f"finish_reason {reason!r}; vLLM from 0.32 returns both by return_token_ids"
            )
        if not all(isinstance(one, float | int) and math.isfinite(one) for one in log_probs):
            raise ServerError(f"the server {server} answered log-probs that are not numbers: {log_probs[:8]}")
        if max(tokens) >= self._vocabulary:
            raise ServerError(
                f"the server {server} answered token {max(tokens)}, and the tokenizer has {self._vocabulary}; serve "
                "the student"
            )


def seed_of(key: NoiseKey) -> int:
    """Return 63 bits that belong to seed, row, step and response."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0] >> np.uint64(1))
