"""How well a run preserved its teacher's shift: overall, by position, by token class, and token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Averaged measures (see ``deltakd.evaluation.token_measures.TokenMeasures``): a correlation, nats, and shares.
MEASURES = ("correlation", "kl_teacher", "kl_raw", "top1_agreement", "nll")
#: Bins of the position in the answer, from 0.
POSITIONS = ("0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64+")
#: Classes of tokens, by their text.
WORD_START, WORD_CONTINUATION, NUMBER = "word start", "word continuation", "number"
PUNCTUATION, WHITESPACE, END = "punctuation", "whitespace", "end of text"
CLASSES = (WORD_START, WORD_CONTINUATION, NUMBER, PUNCTUATION, WHITESPACE, END)


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens.

    Args:
        mean: None if there is nothing to average, or a value is not finite.
        stderr: its standard error over rows; None for one row.
    """

    mean: float | None
    stderr: float | None


@dataclass(frozen=True)
class Group:
    """Measures of a group of tokens.

    Args:
        tokens: number of tokens.
        rows: number of rows that they come from.
        undefined: tokens without a correlation, since a shift has no variance.
        measures: an estimate for each of MEASURES.
    """

    tokens: int
    rows: int
    undefined: int
    measures: dict[str, Estimate]


@dataclass(frozen=True)
class ViewedToken:
    """One token of an answer.

    Args:
        text: its text within the answer, with its leading space.
        teacher_shift, student_shift: log-ratio of the token, tuned to raw, nats; None if not finite.
        correlation: of the two shifts over the vocabulary at this position; None: undefined.
        candidates: role -> (text, probability) of its most probable tokens, most probable first.
    """

    text: str
    teacher_shift: float | None
    student_shift: float | None
    correlation: float | None
    candidates: dict[str, list[tuple[str, float]]]


@dataclass(frozen=True)
class ViewedRow:
    """One held-out row, token by token.

    Args:
        row_id: the row's number in its data set.
        prompt: the text before the answer.
        tokens: the answer's.
    """

    row_id: int
    prompt: str
    tokens: list[ViewedToken]


@dataclass(frozen=True)
class Preservation:
    """Shift preservation of one run on held-out rows.

    Args:
        missing: obstacles to measuring, one sentence each, beginning with the missing item (``teacher: ...``); if not
            empty, everything else is empty.
        measured_on: the inputs of the results: models, rows, limits.
        overall: all tokens; None if something is missing.
        by_position: bin of POSITIONS -> its tokens; bins without tokens are absent.
        by_class: likewise, one of CLASSES.
        token_view: the first rows, token by token.
        by_task: task of the rows -> its tokens; empty if they have one or none.
    """

    missing: list[str] = field(default_factory=list)
    measured_on: dict[str, Any] = field(default_factory=dict)
    overall: Group | None = None
    by_position: dict[str, Group] = field(default_factory=dict)
    by_class: dict[str, Group] = field(default_factory=dict)
    token_view: list[ViewedRow] = field(default_factory=list)
    by_task: dict[str, Group] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return dicts, lists, numbers, strings and None only; ``by_task`` only if there are tasks."""
        return {key: value for key, value in asdict(self).items() if value or key != "by_task"}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preservation:
        """Invert ``to_json``, also after a round trip through a file.

        Raises:
            ValueError: ``value`` is something else.
        """
        try:
            return cls(
                missing=list(value["missing"]),
                measured_on=dict(value["measured_on"]),
                overall=None if value["overall"] is None else _group_from(value["overall"]),
                by_position={name: _group_from(group) for name, group in value["by_position"].items()},
                by_class={name: _group_from(group) for name, group in value["by_class"].items()},
                by_task={name: _group_from(group) for name, group in value.get("by_task", {}).items()},
                token_view=[_row_from(row) for row in value["token_view"]],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not a record of shift preservation ({type(error).__name__}: {error})") from None


def _group_from(value: Mapping[str, Any]) -> Group:
    return Group(**{**value, "measures": {name: Estimate(**e) for name, e in value["measures"].items()}})


def _row_from(value: Mapping[str, Any]) -> ViewedRow:
    return ViewedRow(**{**value, "tokens": [_token_from(token) for token in value["tokens"]]})


def _token_from(value: Mapping[str, Any]) -> ViewedToken:
    candidates = {role: [(text, p) for text, p in pairs] for role, pairs in value["candidates"].items()}
    return ViewedToken(**{**value, "candidates": candidates})


def position_bin(position: int) -> str:
    """Return the bin of POSITIONS of a position in the answer, from 0."""
    return POSITIONS[min(position.bit_length(), len(POSITIONS) - 1)]


def token_class(text: str, before: str, special: bool) -> str:
    """Return the class of a token.

    Args:
        text: the token's text; part of a character is U+FFFD.
        before: the text in front of it; a word continues if the characters on both sides are letters, digits or parts
            of characters (so in a script without spaces all characters but the first continue the word).
        special: True for special tokens of the tokenizer, such as EOS; their class is the end of the text.
    """
    if special:
        return END
    word = text.strip()
    if not word:
        return WHITESPACE
    letters = any(_in_word(c) and not c.isdigit() for c in word)
    if not letters:
        return NUMBER if any(c.isdigit() for c in word) else PUNCTUATION
    # An apostrophe within a word ("'t") belongs to it.
    joined = text[0] == word[0] and (_in_word(text[0]) or text[0] in "'’") and before != "" and _in_word(before[-1])
    return WORD_CONTINUATION if joined else WORD_START


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "\ufffd"


def summarise_tokens(
    values: Mapping[str, NDArray[np.float64]], rows: NDArray[np.int64], names: Sequence[str], order: Sequence[str]
) -> dict[str, Group]:
    """Return the tokens of each name as a group.

    Args:
        values: measure -> [N].
        rows: [N] the row of each token.
        names: N names, such as bins.
        order: all names in the desired order; those without tokens are left out.
    """
    named = np.array(names)
    chosen = {name: named == name for name in order}
    return {name: summarise({k: v[m] for k, v in values.items()}, rows[m]) for name, m in chosen.items() if m.any()}


def summarise(values: Mapping[str, NDArray[np.float64]], rows: NDArray[np.int64]) -> Group:
    """Return means over tokens, as for all losses, with standard errors for a sample of whole rows.

    The mean is Σ_r s_r / Σ_r n_r over R rows with sum s_r and n_r tokens, so its error is that of a ratio:
    √(R / (R − 1) · Σ_r (s_r − mean · n_r)²) / Σ_r n_r (Cochran, Sampling Techniques, 3rd ed., chapter 6).

    Args:
        values: measure -> [N]; tokens without a correlation (NaN) are left out of its mean.
        rows: [N] the row of each token.
    """
    undefined = int(np.isnan(values["correlation"]).sum())
    measures = {}
    for name in MEASURES:
        kept = ~np.isnan(values[name]) if name == "correlation" else np.ones(len(rows), dtype=bool)
        measures[name] = _estimate(values[name][kept], rows[kept])
    return Group(tokens=len(rows), rows=len(np.unique(rows)), undefined=undefined, measures=measures)


def _estimate(values_N: NDArray[np.float64], rows_N: NDArray[np.int64]) -> Estimate:
    if not np.isfinite(values_N).all() or len(values_N) == 0:
        return Estimate(None, None)
    _, row_of_N = np.unique(rows_N, return_inverse=True)
    tokens_R = np.bincount(row_of_N).astype(np.float64)
    mean = float(values_N.mean())
    count = len(tokens_R)
    if count == 1:
        return Estimate(mean, None)
    residual_R = np.bincount(row_of_N, weights=values_N - mean)
    return Estimate(mean, math.sqrt(count / (count - 1) * float((residual_R**2).sum())) / len(values_N))
