"""Teachers behind servers: their log-probs of given tokens, with all others in one bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from deltakd.io.errors import ServerError
from deltakd.io.inference_server import InferenceServer
from deltakd.kernels import Buckets
from deltakd.models.server_model import ServedModel, served_model, served_tokenizer_problems
from deltakd.references.log_prob_servers import LogProbServer, SglangLogProbs, VllmLogProbs
from deltakd.references.outside import NoLogProbsError, kept_log_probs, rows_of, stacked, with_rest
from deltakd.types import TEACHER, TEACHER_RAW, Batch

#: Requests at a time.
CONNECTIONS = 16
#: Seconds for the log-probs of one row.
TIMEOUT = 600.0


@dataclass(frozen=True)
class ServerAddress:
    """Where a model is served.

    Args:
        key: the config key of ``url``.
        url: of the server.
        name_key: the config key of ``name``.
        name: the model's name there; None: the only one.
    """

    key: str
    url: str
    name_key: str
    name: str | None


@final
class ServedTeachers:
    """Asks servers for the log-probs of rows' tokens; nothing is generated but a token that they insist on.

    The teacher is asked for the most probable tokens. The raw teacher is asked for these same tokens.

    Args:
        teacher: where the teacher is served, by vLLM or SGLang.
        raw: where its raw self is, by vLLM; None: nowhere.
        tokenizer: the student's.
        vocabulary: V.
        longest: most tokens of a row.
        k: tokens to keep at each position, at most V.

    Raises:
        LostServerError: a server is not there.
        ValueError: one serves another model, with another tokenizer, or with too little room for a row.
    """

    def __init__(
        self,
        teacher: ServerAddress,
        raw: ServerAddress | None,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        longest: int,
        k: int,
    ) -> None:
        self._vocabulary = vocabulary
        self._k = k
        self._models: dict[str, ServedModel] = {}
        server, model = _open(teacher, tokenizer, longest)
        self._models[TEACHER] = model
        self._url = server.url
        self._teacher: LogProbServer = SglangLogProbs(server) if model.by == "sglang" else VllmLogProbs(server, model)
        self._raw: VllmLogProbs | None = None
        if raw is not None:
            raw_server, raw_model = _open(raw, tokenizer, longest)
            if raw_model.by == "sglang":
                raise ValueError(
                    f"{raw.key}: SGLang scores one list of tokens at all positions, and the raw teacher is asked for "
                    "others at each; serve it with vLLM, or load it here"
                )
            self._models[TEACHER_RAW] = raw_model
            self._raw = VllmLogProbs(raw_server, raw_model)
            self._raw_url = raw_server.url

    @property
    def k(self) -> int:
        """Tokens kept at each position."""
        return self._k

    @property
    def identities(self) -> dict[str, dict[str, Any]]:
        """Return role -> what the cache's manifest says about its model."""
        unknown = dict.fromkeys(("dtype", "quantization", "sha256", "commit"))
        return {
            role: {"path": model.source or model.name, "elsewhere": model.name, **unknown}
            for role, model in self._models.items()
        }

    def buckets(self, batch: Batch) -> Buckets:
        """Return the log-probs of each label, of the teacher's k − 1 most probable other tokens, and of the rest.

        Raises:
            ServerError: a server is gone, refuses, or answers something else than was asked.
        """
        rows, trained = rows_of(batch)
        numbers = batch.row_ids.tolist()
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="served") as pool:
            asked = list(pool.map(lambda row: self._teacher.top(row, self._k), rows))
            found = [
                [self._kept(f"row {number}, token {place}", entries[place], row[place]) for place in places]
                for number, row, entries, places in zip(numbers, rows, asked, trained, strict=True)
            ]
            support_NK, log_probs_NK = stacked([one for of_row in found for one in of_row], self._k)
            log_probs = {TEACHER: with_rest(log_probs_NK, self._vocabulary)}
            if self._raw is not None:
                raw_NK = np.concatenate(
                    [np.empty((0, self._k)), *pool.map(self._scored, numbers, rows, trained, found)]
                )
                log_probs[TEACHER_RAW] = with_rest(raw_NK, self._vocabulary)
        return Buckets(support_NK, log_probs, 1.0)

    def _kept(self, where: str, entry: Mapping[int, float] | None, label: int) -> tuple[list[int], list[float]]:
        """Return k token ids, the label first, and their log-probs; checked."""
        if entry is None:
            raise ServerError(f"the server {self._url}, {where}: no log-probs are there")
        if label not in entry:
            raise ServerError(
                f"the server {self._url}, {where}: the row's own token {label} has no log-prob: the positions are "
                "shifted"
            )
        try:
            return kept_log_probs(entry, label, self._k, self._vocabulary)
        except NoLogProbsError as error:
            cut = "; the server cuts them (--max-logprobs)" if len(entry) < self._k else ""
            raise ServerError(f"the server {self._url}, {where}: {error}{cut}") from None

    def _scored(
        self, number: int, row: Sequence[int], places: Sequence[int], kept: Sequence[tuple[list[int], list[float]]]
    ) -> NDArray[np.float64]:
        """Return the raw teacher's log-probs [n, k] of the tokens kept at n places of a row; checked."""
        assert self._raw is not None
        if not places:
            return np.empty((0, self._k))
        ids_RK = np.full((len(row) - places[0], self._k), -1, np.int64)
        at = np.array(places) - places[0]
        ids_RK[at] = [ids for ids, _ in kept]
        values = self._raw.of(row, places[0], ids_RK)[at]
        for place, (ids, _), of_place in zip(places, kept, values.tolist(), strict=True):
            try:
                kept_log_probs(dict(zip(ids, of_place, strict=True)), ids[0], self._k, self._vocabulary)
            except NoLogProbsError as error:
                raise ServerError(f"the server {self._raw_url}, row {number}, token {place}: {error}") from None
        return np.minimum(values, 0.0)


def _open(
    address: ServerAddress, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[InferenceServer, ServedModel]:
    server = InferenceServer(address.url, timeout=TIMEOUT, connections=CONNECTIONS)
    model = served_model(server, address.name, address.name_key)
    problems = served_tokenizer_problems(server, model, tokenizer)
    # The server insists on one token of its own.
    if model.longest is not None and model.longest <= longest:
        option = "--context-length" if model.by == "sglang" else "--max-model-len"
        problems.append(
            f"the server {server.url} holds {model.longest} tokens, and rows have up to {longest} and one more is "
            f"generated; start it with {option} {longest + 1}"
        )
    if problems:
        raise ValueError("; ".join(f"{address.key}: {problem}" for problem in problems))
    return server, model
