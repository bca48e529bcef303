"""Records with top-k log-probs, in the formats of DistillKit and of Axolotl's KD plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltakd.references.distillkit import Compression

#: How Axolotl's entries name their token.
_TOKEN = "token_id:"
#: The names that Axolotl gives to the field of log-probs, unless the user chose another.
_FIELDS = ("logprobs", "target_logprobs")
#: The most by which probabilities that are read off a curve may exceed 1.
_CURVE_ERROR = 0.1
KNOWN = (
    "DistillKit's input_ids with compressed_logprobs and bytepacked_indices, or with token_ids and top_values; "
    "Axolotl's logprobs of entries {'token': 'token_id:N', 'logprob': x}, or target_token_ids with a list of log-probs"
)


@dataclass(frozen=True)
class Positions:
    """The log-probs of a row.

    Args:
        ids: token ids of all positions, one after the other, int64.
        values: their log-probs, float32.
        counts: tokens of each position; 0: none are there.
        predicts_next: True if the first position is the prediction of the second token, and so on; False if the last
            position is the prediction of the last token, the one before of the one before.
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float32]
    counts: NDArray[np.int64]
    predicts_next: bool


def tokens_of(record: Mapping[str, Any]) -> list[int] | None:
    """Return the row's token ids, if the record has them."""
    found = record.get("input_ids")
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(token, int) for token in found):
        raise ValueError("input_ids is not a list of token ids")
    return found


def needs_compression(record: Mapping[str, Any]) -> bool:
    """True if the record is compressed as DistillKit compresses, and ``Compression`` says how."""
    return "compressed_logprobs" in record and "bytepacked_indices" in record


def positions_of(record: Mapping[str, Any], compression: Compression | None) -> Positions:
    """Read the log-probs of a record.

    Args:
        record: in one of the formats.
        compression: of DistillKit's compressed records.

    Raises:
        ValueError: it is in none of the formats, or malformed.
    """
    if needs_compression(record):
        assert compression is not None
        return _compressed(record["compressed_logprobs"], record["bytepacked_indices"], compression)
    if "packed_indices" in record and "coeffs" in record:
        raise ValueError(
            "packed_indices, exact_values and coeffs are DistillKit's older compression, which keeps logits around "
            "their mean; how much the other tokens weigh can't be told from them. Make the log-probs again with its "
            "current sampler"
        )
    if "token_ids" in record and "top_values" in record:
        return _parallel(record["token_ids"], record["top_values"], "token_ids", "top_values", predicts_next=True)
    name = _field(record)
    if name is None:
        raise ValueError(f"no log-probs in the fields {', '.join(map(str, record))}; known are {KNOWN}")
    if record.get("target_token_ids") is not None:
        return _parallel(record["target_token_ids"], record[name], "target_token_ids", name, predicts_next=False)
    return _entries(record[name], name)


def _field(record: Mapping[str, Any]) -> str | None:
    """Return the name of Axolotl's log-probs: one of its own, or the only field that has their form."""
    of_numbers = record.get("target_token_ids") is not None
    fitting = [
        name
        for name, value in record.items()
        if name not in ("target_token_ids", "target_mask") and _has_form(value, of_numbers)
    ]
    own = [name for name in _FIELDS if name in fitting]
    if own or len(fitting) == 1:
        return (own or fitting)[0]
    return None


def _has_form(value: Any, of_numbers: bool) -> bool:
    """True for a list with a list of numbers, or of entries ``{"token", "logprob"}``, for each position."""
    if not isinstance(value, list):
        return False
    first = next((one for one in value if one), None)
    if not isinstance(first, list):
        return False
    if of_numbers:
        return all(isinstance(number, float | int) for number in first)
    return isinstance(first[0], dict) and {"token", "logprob"} <= first[0].keys()


def _entries(positions: Sequence[Any], name: str) -> Positions:
    """Read ``[[{"token": "token_id:5", "logprob": -0.1}, ...], ...]``; a position may be null."""
    ids: list[int] = []
    values: list[float] = []
    counts = []
    for place, entries in enumerate(positions):
        counts.append(len(entries or ()))
        for entry in entries or ():
            try:
                token = str(entry["token"])
                values.append(float(entry["logprob"]))
                ids.append(int(token.removeprefix(_TOKEN) if token.startswith(_TOKEN) else "?"))
            except (KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{name}, position {place}: {entry!r:.80} is not an entry {{'token': 'token_id:N', 'logprob': x}}; "
                    "vLLM writes them with --return-tokens-as-token-ids"
                ) from None
    return _finite(np.array(ids, np.int64), np.array(values, np.float32), np.array(counts, np.int64), False)


def _parallel(tokens: Any, values: Any, ids_name: str, values_name: str, predicts_next: bool) -> Positions:
    """Read two lists of lists: the token ids of each position, and their log-probs."""
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
        raise ValueError(f"{ids_name} and {values_name} are not lists of equal length")
    sizes = [(len(of or ()), len(their or ())) for of, their in zip(tokens, values, strict=True)]
    uneven = [place for place, (of, their) in enumerate(sizes) if of != their]
    if uneven:
        raise ValueError(
            f"position {uneven[0]} has {sizes[uneven[0]][0]} of {ids_name} and {sizes[uneven[0]][1]} of {values_name}"
        )
    try:
        ids = np.array([token for of in tokens for token in of or ()], np.int64)
        numbers = np.array([value for of in values for value in of or ()], np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{ids_name} and {values_name} hold something other than numbers") from None
    return _finite(ids, numbers, np.array([of for of, _ in sizes], np.int64), predicts_next)


def _compressed(values: Any, tokens: Any, compression: Compression) -> Positions:
    packed = np.array(values, np.uint8).reshape(len(values), -1)
    indices = np.array(tokens, np.uint8).reshape(len(tokens), -1)
    wanted = (compression.log_prob_bytes, (compression.k * compression.index_bits + 7) // 8)
    if len(packed) != len(indices) or (packed.shape[1], indices.shape[1]) != wanted:
        raise ValueError(
            f"positions have {packed.shape[1]} bytes of log-probs and {indices.shape[1]} of token ids, and "
            f"compression_config.yaml says {wanted[0]} and {wanted[1]}: it belongs to other files"
        )
    log_probs = _no_heavier(compression.log_probs(packed))
    counts = np.full(len(packed), compression.k, np.int64)
    return _finite(compression.ids(indices).ravel(), log_probs.ravel(), counts, True)


def _no_heavier(log_probs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale probabilities [T, k] that add up to a little more than 1: a curve through them misses them a little."""
    masses = np.exp(log_probs.astype(np.float64)).sum(axis=1, keepdims=True)
    return (log_probs - np.log(np.where(masses < 1 + _CURVE_ERROR, np.maximum(masses, 1.0), 1.0))).astype(np.float32)


def _finite(
    ids: NDArray[np.int64], values: NDArray[np.float32], counts: NDArray[np.int64], predicts_next: bool
) -> Positions:
    """Leave out tokens of probability 0, with which both tools fill up a position."""
    there = values != -np.inf
    if not there.all():
        place = np.repeat(np.arange(len(counts)), counts)
        ids, values, counts = ids[there], values[there], np.bincount(place[there], minlength=len(counts))
    return Positions(ids, values, counts, predicts_next)
