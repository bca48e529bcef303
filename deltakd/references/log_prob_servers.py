"""The requests by which vLLM and SGLang give the log-probs of a row's tokens; nothing is kept of what they generate."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltakd.io.errors import RefusedError, ServerError
from deltakd.io.inference_server import InferenceServer
from deltakd.models.server_model import ServedModel


class LogProbServer(Protocol):
    """Gives the log-probs of the most probable tokens at each position."""

    def top(self, tokens: Sequence[int], k: int) -> list[dict[int, float] | None]:
        """Return for each of T tokens: id -> log-prob of the distribution that predicts it; None: there is none.

        Each has the row's own token and the k most probable ones.

        Raises:
            ServerError: the server is gone, refuses, or answers something else than was asked.
        """
        ...


class VllmLogProbs:
    """vLLM's ``prompt_logprobs`` over ``/v1/completions``.

    Args:
        server: the server.
        model: its model.
    """

    def __init__(self, server: InferenceServer, model: ServedModel) -> None:
        self._server = server
        self._model = model

    def top(self, tokens: Sequence[int], k: int) -> list[dict[int, float] | None]:
        """Return the log-probs of each token's distribution, as ``LogProbServer``."""
        body = {
            "model": self._model.name,
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
            "return_token_ids": True,
        }
        try:
            answer = self._server.post("/v1/completions", body)
        except RefusedError as error:
            if "max allowed" not in str(error):
                raise
            raise ServerError(f"{error}; start it with --max-logprobs {k}, or give a smaller reference.k") from None
        try:
            choice = answer["choices"][0]
            entries, read = choice["prompt_logprobs"], choice["prompt_token_ids"]
        except (KeyError, IndexError, TypeError):
            entries, read = None, None
        if not isinstance(entries, list) or read is None:
            raise ServerError(
                f"the server {self._server.url} answers without prompt_logprobs and prompt_token_ids, as vLLM has them"
            )
        if read != list(tokens) or len(entries) != len(tokens):
            raise _of_another_row(self._server, tokens, len(entries), len(read))
        return [None if one is None else _numbers(self._server, one) for one in entries]

    def of(self, tokens: Sequence[int], first: int, ids_RK: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the log-probs [R, K] of given token ids [R, K] as predictions of a row's last R tokens.

        vLLM's ``prompt_logprob_token_ids`` over ``/inference/v1/generate``.

        Args:
            tokens: the row.
            first: place of the first of the R tokens, at least 1.
            ids_RK: token ids; −1 for none.

        Raises:
            ServerError: the server is gone, can't do it, or answers something else than was asked.
        """
        asked = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprob_token_ids": ids_RK.tolist(),
            "prompt_logprob_start": first - 1,
        }
        body = {"model": self._model.name, "token_ids": list(tokens), "sampling_params": asked}
        try:
            answer = self._server.post("/inference/v1/generate", body)
        except RefusedError as error:
            raise ServerError(f"{error}{_remedy(error, ids_RK.shape[1])}") from None
        encoded = str(answer.get("prompt_token_id_logprobs")) if isinstance(answer, Mapping) else ""
        try:
            found = np.load(io.BytesIO(base64.b64decode(encoded, validate=True)), allow_pickle=False)
        except (TypeError, ValueError, EOFError, binascii.Error):
            raise ServerError(
                f"the server {self._server.url} answers without prompt_token_id_logprobs, as vLLM 0.32 has them"
            ) from None
        if found.shape != ids_RK.shape:
            raise ServerError(
                f"the server {self._server.url} was asked for log-probs of {list(ids_RK.shape)} tokens, and answers "
                f"{list(found.shape)}: they don't belong to the row"
            )
        return found.astype(np.float64)


class SglangLogProbs:
    """SGLang's ``/generate`` with ``return_logprob`` and ``top_logprobs_num``.

    Args:
        server: the server.
    """

    def __init__(self, server: InferenceServer) -> None:
        self._server = server

    def top(self, tokens: Sequence[int], k: int) -> list[dict[int, float] | None]:
        """Return the log-probs of each token's distribution, as ``LogProbServer``."""
        body = {
            "input_ids": list(tokens),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": k,
        }
        answer = self._server.post("/generate", body)
        try:
            own, top = (answer["meta_info"][name] for name in ("input_token_logprobs", "input_top_logprobs"))
            read = [int(entry[1]) for entry in own]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ServerError(
                f"the server {self._server.url} answers without input_token_logprobs and input_top_logprobs, as SGLang "
                "has them"
            ) from None
        if read != list(tokens) or len(top) != len(tokens):
            raise _of_another_row(self._server, tokens, len(top), len(read))
        return [self._entry(one, most) for one, most in zip(own, top, strict=True)]

    def _entry(self, own: Sequence[Any], most: Sequence[Sequence[Any]] | None) -> dict[int, float] | None:
        """Join ``[log-prob, id, text]`` of the token itself and of the most probable ones; the first token has none."""
        if most is None or own[0] is None:
            return None
        try:
            return {int(token): float(value) for value, token, *_ in (*most, own)}
        except (TypeError, ValueError):
            raise _no_log_probs(self._server, most) from None


def _numbers(server: InferenceServer, entry: Any) -> dict[int, float]:
    """Return id -> log-prob of ``{"5": {"logprob": -0.1, ...}, ...}``."""
    try:
        return {int(token): float(one["logprob"]) for token, one in entry.items()}
    except (AttributeError, TypeError, ValueError, KeyError):
        raise _no_log_probs(server, entry) from None


def _no_log_probs(server: InferenceServer, entry: Any) -> ServerError:
    return ServerError(f"the server {server.url}: these are not log-probs of token ids: {str(entry)[:150]}")


def _of_another_row(server: InferenceServer, tokens: Sequence[int], positions: int, read: int) -> ServerError:
    return ServerError(
        f"the server {server.url} was sent {len(tokens)} tokens, and answers {positions} positions over {read} tokens: "
        "they don't belong to the row"
    )


def _remedy(error: RefusedError, k: int) -> str:
    """Return how to start a server that refuses ``prompt_logprob_token_ids``."""
    if error.status == 404:
        return "; start it with --enable-scale-out, which needs vLLM 0.32 or newer"
    if "V2 model runner" in str(error):
        return (
            "; vLLM scores given tokens with its V2 model runner alone, which needs Triton (no CPU has it): start the "
            "server on a GPU, or load the raw teacher here"
        )
    return f"; start it with --max-logprobs {k}" if "max allowed" in str(error) else ""
