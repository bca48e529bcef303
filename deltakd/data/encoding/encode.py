"""Rows to tokens: prompt and response are tokenised separately; only the response and its EOS are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltakd.data.encoding.encoded_set import Encoded
from deltakd.data.encoding.templates import Template
from deltakd.data.encoding.tokens import eos_id, prompt_tokens, segment_tokens
from deltakd.data.encoding.trained_text import check_trained
from deltakd.data.sources.records import Problems
from deltakd.data.sources.rows import Row, RowError
from deltakd.types import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Outcome:
    """An encoded row: its tokens (None if dropped), its lengths before cutting, and what was cut."""

    encoded: Encoded | None
    prompt_length: int
    total_length: int
    cut_prompt: bool
    cut_response: bool


def encode_row(
    row: Row,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    overlong: str = "cut",
) -> Encoded | None:
    """Tokenise one row for training on its first response.

    Args:
        row: the row.
        template: renders it.
        tokenizer: must have an EOS token.
        max_length: most tokens of prompt and response, EOS included.
        max_prompt_length: most tokens of the prompt; in a conversation, of everything before its first answer.
        overlong: ``cut`` shortens a long prompt (``prompt_tokens``), and a long response, which then has no EOS to
            learn; ``drop`` leaves the row out.

    Returns:
        The tokens, or None if the row is dropped or has nothing to train on.

    Raises:
        RowError: the template can't render the row, or leaves out a part of its answers.
        ValueError: there is no EOS token or no response, or the limits contradict each other or leave no room for the
            tail.
    """
    check_limits(tokenizer, max_length, max_prompt_length, overlong)
    return outcome_of(row, template, tokenizer, max_length, max_prompt_length, overlong).encoded


def encode_prompt(
    row: Row, template: Template, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> list[int]:
    """Return the prompt's tokens for generation: the same as in training, cut to ``max_prompt_length``.

    In a conversation, the prompt is everything before the last answer; training limits only its first prompt.

    Raises:
        ValueError: the limit leaves no room for the template's tail.
    """
    return _cut_prompt(row, template, tokenizer, max_prompt_length)[0]


def encode_prompts(
    rows: Sequence[Row], template: Template, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> tuple[list[list[int]], int]:
    """Return the tokens of many prompts, each as from ``encode_prompt``, and the number of prompts cut.

    Raises:
        ValueError: as ``encode_prompt``; all rows that the template refuses are named together.
    """
    problems = Problems("prompts")
    cut = []
    for row in rows:
        with problems.noting(RowError):
            cut.append(_cut_prompt(row, template, tokenizer, max_prompt_length))
    problems.raise_any()
    return [ids for ids, _ in cut], sum(whole > len(ids) for ids, whole in cut)


def _cut_prompt(
    row: Row, template: Template, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> tuple[list[int], int]:
    segments = template.render(row)
    answers = [number for number, segment in enumerate(segments) if segment.trained]
    prompt = segments[: answers[-1]] if answers else segments
    return prompt_tokens(prompt, row, template, tokenizer, max_prompt_length)


def check_limits(tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int, overlong: str) -> None:
    """Raise a ValueError if the settings cannot work."""
    if overlong not in ("cut", "drop"):
        raise ValueError(f"data.overlong = {overlong!r}; allowed: cut, drop")
    if not 0 < max_prompt_length < max_length:
        raise ValueError(
            f"data.max_prompt_length = {max_prompt_length} must be at least 1 and less than data.max_length = "
            f"{max_length}, so that every row has room for a response"
        )
    eos_id(tokenizer)


def outcome_of(
    row: Row,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    overlong: str,
) -> Outcome:
    """Tokenise one row as ``encode_row`` does, and say what was cut."""
    segments = template.render(row)
    answer = next((number for number, segment in enumerate(segments) if segment.trained), None)
    if answer is None:
        raise ValueError(f"{row.label} has no response to train on")
    check_trained(row, segments)
    ids, prompt_length = prompt_tokens(segments[:answer], row, template, tokenizer, max_prompt_length)
    labels = [IGNORE_INDEX] * len(ids)
    for segment in segments[answer:]:
        tokens = segment_tokens(segment, tokenizer)
        ids += tokens
        labels += tokens if segment.trained else [IGNORE_INDEX] * len(tokens)
    total_length = len(ids) + prompt_length - min(prompt_length, max_prompt_length)
    cut_prompt, cut_response = prompt_length > max_prompt_length, len(ids) > max_length
    if overlong == "drop" and (cut_prompt or total_length > max_length):
        return Outcome(None, prompt_length, total_length, False, False)
    ids, labels = _trim(ids[:max_length], labels[:max_length])
    # Nothing predicts position 0, so a label there trains nothing.
    encoded = Encoded(ids, labels, row.id) if any(label != IGNORE_INDEX for label in labels[1:]) else None
    return Outcome(encoded, prompt_length, total_length, cut_prompt, cut_response)


def _trim(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Drop everything after the last trained token: it would cost time and teach nothing."""
    stop = len(labels)
    while stop and labels[stop - 1] == IGNORE_INDEX:
        stop -= 1
    return ids[:stop], labels[:stop]
