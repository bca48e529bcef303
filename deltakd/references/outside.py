"""Log-probs that somebody else computed, from a server or from files, as entries of a top-K store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from deltakd.kernels import Buckets
from deltakd.references.content import differs
from deltakd.types import IGNORE_INDEX, Batch

#: Log-probs may exceed 0, and their probabilities 1, by this much: float32, and models that compute in bfloat16.
SLACK = 1e-3
#: The smallest mass of the rest, in proportion: below it float32 log-probs of the others can't tell it from 0.
LEAST_REST = 1e-7


class LogProbSource(Protocol):
    """Returns log-probs of a few tokens for roles whose models are not loaded."""

    @property
    def k(self) -> int:
        """Tokens kept at each position."""
        ...

    @property
    def identities(self) -> dict[str, dict[str, Any]]:
        """Return role -> what the cache's manifest says about its model, as ``model_identity`` does of a loaded one."""
        ...

    def buckets(self, batch: Batch) -> Buckets:
        """Return the log-probs of K tokens and of the rest for the N valid tokens of a batch.

        Raises:
            ValueError: they are not there, or can't be log-probs of these tokens.
        """
        ...


class NoLogProbsError(ValueError):
    """Numbers that can't be the log-probs of a position; the message says why, without the place."""


def outside_problems(content: Mapping[str, Any], source: LogProbSource, path: object) -> list[str]:
    """Return why rows of a source can't be added to a cache: it has another K, or its log-probs are of other models.

    Args:
        content: of the cache.
        source: the servers or files.
        path: the cache's path.
    """
    found = [] if source.k == content["k"] else [differs("reference.k", source.k, content["k"], path)]
    for role, given in source.identities.items():
        held = content["models"].get(role, {})
        if held.get("elsewhere") != given["elsewhere"]:
            here, there = (str(one.get("elsewhere") or one.get("path"))[:60] for one in (given, held))
            found.append(differs(f"the source of the {role}'s log-probs", here, there, path))
    return found


def rows_of(batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
    """Return each row's tokens without padding, and the places of its trained tokens."""
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    trained = [
        [place for place, label in enumerate(labels.tolist()) if place and label != IGNORE_INDEX]
        for labels in batch.labels
    ]
    return rows, trained


def kept_log_probs(found: Mapping[int, float], label: int, k: int, vocabulary: int) -> tuple[list[int], list[float]]:
    """Return k token ids, the label first, then the most probable others; and their log-probs.

    Args:
        found: token id -> log-prob, with the label's.
        label: the token trained on.
        k: at most V.
        vocabulary: V.

    Raises:
        NoLogProbsError: too few tokens, unknown ones, or numbers that are not log-probs.
    """
    beyond = [token for token in found if not 0 <= token < vocabulary]
    if beyond:
        raise NoLogProbsError(f"token {beyond[0]} is beyond the tokenizer's {vocabulary} tokens")
    if any(math.isnan(value) or value > SLACK for value in found.values()):
        raise NoLogProbsError(f"a log-prob is above 0 or not a number: {max(found.values())}")
    others = sorted((token for token in found if token != label), key=lambda token: -found[token])[: k - 1]
    if len(others) < k - 1:
        raise NoLogProbsError(f"{len(found)} tokens have log-probs, and reference.k={k} were asked for")
    kept = [label, *others]
    values = [min(found[token], 0.0) for token in kept]
    total = sum(map(math.exp, values))
    if total > 1 + SLACK:
        raise NoLogProbsError(f"the probabilities of {k} tokens add up to {total:.4f}")
    return kept, values


def with_rest(log_probs_NK: NDArray[np.float64], vocabulary: int) -> torch.Tensor:
    """Append the log-prob of all other tokens, [N, K + 1] float32; [N, K] if there are none."""
    if log_probs_NK.shape[1] < vocabulary:
        rest_N = np.maximum(1.0 - np.exp(log_probs_NK).sum(axis=1), LEAST_REST)
        log_probs_NK = np.concatenate([log_probs_NK, np.log(rest_N)[:, None]], axis=1)
    return torch.from_numpy(log_probs_NK).float()


def stacked(found: Sequence[tuple[Sequence[int], Sequence[float]]], k: int) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """Return the ids [N, K] int64 and the log-probs [N, K] of N positions."""
    support_NK = torch.from_numpy(np.array([ids for ids, _ in found], dtype=np.int64).reshape(-1, k))
    return support_NK, np.array([values for _, values in found], dtype=np.float64).reshape(-1, k)
