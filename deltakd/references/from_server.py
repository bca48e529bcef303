"""A teacher behind a vLLM server: its log-probs of given tokens, with all others in one bucket."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from deltakd.io.errors import RefusedError, ServerError
from deltakd.io.inference_server import InferenceServer
from deltakd.kernels import Buckets
from deltakd.models.server_model import served_model, served_tokenizer_problems
from deltakd.types import IGNORE_INDEX, TEACHER, Batch

#: Requests at a time.
CONNECTIONS = 16
#: Seconds for the log-probs of one row.
TIMEOUT = 600.0
#: Log-probs may exceed 0, and their probabilities 1, by this much: float32, and servers that compute in bfloat16.
_SLACK = 1e-3
#: The smallest mass of the rest, in proportion: below it float32 log-probs of the others can't tell it from 0.
_LEAST_REST = 1e-7


@final
class ServedTeacher:
    """Asks a server for the log-probs of rows' tokens (vLLM's ``prompt_logprobs``); nothing is generated.

    Args:
        url: of the server.
        wanted: the model's name there; None: the only one.
        tokenizer: the student's.
        vocabulary: V.
        longest: most tokens of a row.

    Raises:
        LostServerError: the server is not there.
        ValueError: it serves another model, with another tokenizer, or with too little room for a row.
    """

    def __init__(
        self, url: str, wanted: str | None, tokenizer: PreTrainedTokenizerBase, vocabulary: int, longest: int
    ) -> None:
        self._server = InferenceServer(url, timeout=TIMEOUT, connections=CONNECTIONS)
        self._model = served_model(self._server, wanted, "reference.served_model")
        self._vocabulary = vocabulary
        problems = served_tokenizer_problems(self._server, self._model, tokenizer)
        # The server insists on one token of its own.
        if self._model.longest is not None and self._model.longest <= longest:
            problems.append(
                f"the server {self._server.url} holds {self._model.longest} tokens, and rows have up to {longest} and "
                f"one more is generated; start it with --max-model-len {longest + 1}"
            )
        if problems:
            raise ValueError("; ".join(f"reference.url: {problem}" for problem in problems))

    @property
    def identity(self) -> dict[str, Any]:
        """What the cache's manifest says about the model, as ``model_identity`` does of one that is loaded."""
        unknown = dict.fromkeys(("dtype", "quantization", "sha256", "commit"))
        return {"path": self._model.source or self._model.name, "served": self._model.name, **unknown}

    def buckets(self, batch: Batch, k: int) -> Buckets:
        """Return the teacher's log-probs of each label and of the k − 1 most probable other tokens, and of the rest.

        Args:
            batch: rows with N valid tokens.
            k: at most V.

        Raises:
            ServerError: the server is gone, refuses, or answers something else than was asked.
        """
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        trained = [
            [place for place, label in enumerate(labels.tolist()) if place and label != IGNORE_INDEX]
            for labels in batch.labels
        ]
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="served") as pool:
            asked = list(pool.map(lambda row: self._ask(row, k), rows))
        found = [
            self._kept(f"row {number}, token {place}", entries[place], row[place], k)
            for number, row, entries, places in zip(batch.row_ids.tolist(), rows, asked, trained, strict=True)
            for place in places
        ]
        support_NK = torch.from_numpy(np.array([ids for ids, _ in found], dtype=np.int64).reshape(-1, k))
        assert torch.equal(support_NK[:, 0], batch.labels_N.cpu()), "labels are tokens of their rows"
        log_probs_NK = np.array([values for _, values in found], dtype=np.float64).reshape(-1, k)
        return Buckets(support_NK, {TEACHER: torch.from_numpy(self._with_rest(log_probs_NK)).float()}, 1.0)

    def _ask(self, tokens: Sequence[int], k: int) -> list[Any]:
        """Return an entry per token of a row: id (as text) -> {logprob, ...} of the distribution that predicts it."""
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
            raise ServerError(
                f"the server {self._server.url} was sent {len(tokens)} tokens, and answers {len(entries)} positions "
                f"over {len(read)} tokens: they don't belong to the row"
            )
        return entries

    def _kept(self, where: str, entry: Any, label: int, k: int) -> tuple[list[int], list[float]]:
        """Return k token ids, the label first, and their log-probs; checked."""
        server = f"the server {self._server.url}, {where}"
        if not isinstance(entry, Mapping):
            raise ServerError(f"{server}: no log-probs are there")
        try:
            found = {int(token): float(one["logprob"]) for token, one in entry.items()}
        except (TypeError, ValueError, KeyError):
            raise ServerError(f"{server}: these are no log-probs of token ids: {str(entry)[:150]}") from None
        if label not in found:
            raise ServerError(f"{server}: the row's own token {label} has no log-prob: the positions are shifted")
        beyond = [token for token in found if not 0 <= token < self._vocabulary]
        if beyond:
            raise ServerError(f"{server}: token {beyond[0]} is beyond the tokenizer's {self._vocabulary} tokens")
        if any(math.isnan(value) or value > _SLACK for value in found.values()):
            raise ServerError(f"{server}: a log-prob is above 0 or no number: {max(found.values())}")
        others = sorted((token for token in found if token != label), key=lambda token: -found[token])[: k - 1]
        if len(others) < k - 1:
            raise ServerError(
                f"{server}: {len(found)} tokens have log-probs, and reference.k={k} were asked for; the server "
                "cuts them (--max-logprobs)"
            )
        kept = [label, *others]
        values = [min(found[token], 0.0) for token in kept]
        if sum(map(math.exp, values)) > 1 + _SLACK:
            raise ServerError(f"{server}: the probabilities of {k} tokens add up to {sum(map(math.exp, values)):.4f}")
        return kept, values

    def _with_rest(self, log_probs_NK: NDArray[np.float64]) -> NDArray[np.float64]:
        """Append the log-prob of all other tokens; nothing if there are none."""
        if log_probs_NK.shape[1] >= self._vocabulary:
            return log_probs_NK
        rest_N = np.maximum(1.0 - np.exp(log_probs_NK).sum(axis=1), _LEAST_REST)
        return np.concatenate([log_probs_NK, np.log(rest_N)[:, None]], axis=1)
