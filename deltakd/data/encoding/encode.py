"""Rows to tokens: a row is tokenised as one text (``one_text``); only its answers and their ends are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deltakd.data.encoding.chat_template import HistoryError
from deltakd.data.encoding.encoded_set import Encoded
from deltakd.data.encoding.examples import only_last_answer
from deltakd.data.encoding.image_reader import ImageError, ImageReader, reader_beside
from deltakd.data.encoding.images import row_images
from deltakd.data.encoding.one_text import OneText, TextError, Tokenised, join, tokenise
from deltakd.data.encoding.segments import Segment, Template
from deltakd.data.encoding.tokens import TextEncoder, eos_id
from deltakd.data.encoding.trained_text import check_trained
from deltakd.data.sources.records import Problems
from deltakd.data.sources.rows import Row, RowError
from deltakd.types import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Outcome:
    """An encoded row.

    Args:
        encoded: its tokens; None if it is dropped, or there is a problem.
        prompt_length: tokens of the prompt before cutting.
        total_length: tokens of the row before cutting.
        cut_prompt: True if the prompt was cut.
        cut_response: True if the response was cut.
        kept_border: True if a merge of prompt and answer was undone (``one_text``).
        control_tokens: True if control tokens in the data became text (``control_tokens``).
        problem: why the row can't be encoded; None if it can.
        answers: [start, stop) of the trained answers in the tokens of ``encoded``, empty where cut off.
        cut_other: True if prompt or response were cut in the teachers' tokenizer, if they have one of their own.
    """

    encoded: Encoded | None
    prompt_length: int = 0
    total_length: int = 0
    cut_prompt: bool = False
    cut_response: bool = False
    kept_border: bool = False
    control_tokens: bool = False
    problem: RowError | None = None
    answers: tuple[tuple[int, int], ...] = ()
    cut_other: bool = False


def encode_row(
    row: Row,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    overlong: str = "cut",
) -> Encoded | None:
    """Tokenise one row for training on its first response; the one-row form of ``encode_batch``.

    Returns:
        The tokens, or None if the row is dropped or has nothing to train on.

    Raises:
        RowError: the template can't render the row, or drops part of its answers.
        ValueError: as ``encode_batch``.
    """
    [outcome] = encode_batch([row], template, tokenizer, max_length, max_prompt_length, overlong)
    if outcome.problem is not None:
        raise outcome.problem
    return outcome.encoded


def encode_batch(
    rows: Sequence[Row],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    overlong: str = "cut",
) -> list[Outcome]:
    """Tokenise rows for training, each on its first response, in one call of the tokenizer.

    Args:
        rows: the rows; a few hundred at a time keep the tokenizer's threads busy.
        template: renders them.
        tokenizer: must have an EOS token.
        max_length: most tokens of prompt and response, EOS included.
        max_prompt_length: most tokens of the prompt; in a conversation, of everything before its first answer.
        overlong: ``cut`` shortens a long prompt (``encode_prompt``), and a long response, which then has no EOS to
            learn; ``drop`` leaves the row out.

    Returns:
        One outcome per row, in order. An outcome also holds the row's problem, if any.

    Raises:
        ValueError: there is no EOS token, or the limits contradict each other or leave no room for the template's tail.
    """
    check_limits(tokenizer, max_length, max_prompt_length, overlong)
    encoder = TextEncoder(tokenizer)
    outcomes: list[Outcome | None] = [None] * len(rows)
    places: list[int] = []
    texts: list[OneText] = []
    for place, row in enumerate(rows):
        try:
            texts.append(_one_text(row, template, encoder, _trained_segments))
            places.append(place)
        except RowError as error:
            outcomes[place] = Outcome(None, problem=error)
    for place, text, tokenised in zip(places, texts, tokenise(texts, encoder), strict=True):
        row = rows[place]
        if isinstance(tokenised, TextError):
            outcomes[place] = Outcome(None, problem=_row_error(row, tokenised, encoder))
            continue
        prompt = _Prompt(tokenised.ids[: tokenised.spans[0][0]], text.text[: text.spans[0][0]])
        kept = _cut(prompt, row, template, encoder, max_prompt_length)
        outcome = _outcome(row, tokenised, kept, max_length, max_prompt_length, overlong)
        outcome = _with_images(outcome, row, tokenised, tokenizer)
        outcomes[place] = replace(outcome, control_tokens=True) if text.guarded else outcome
    return [outcome for outcome in outcomes if outcome is not None]


def _one_text(
    row: Row, template: Template, encoder: TextEncoder, segments_of: Callable[[Row, Template], list[Segment]]
) -> OneText:
    guarded, held = encoder.control.guarded(row)
    try:
        return join(segments_of(guarded, template), encoder, held)
    except RowError as error:
        if not held:
            raise
        raise RowError(encoder.control.readable(str(error))) from error


def _row_error(row: Row, error: TextError, encoder: TextEncoder) -> RowError:
    return RowError(encoder.control.readable(f"{row.label}: {error}"))


def _trained_segments(row: Row, template: Template) -> list[Segment]:
    segments = template.render(row)
    if not any(segment.trained for segment in segments):
        raise RowError(f"{row.label} has no response to train on")
    check_trained(row, segments)
    return segments


def _outcome(
    row: Row, tokenised: Tokenised, prompt: list[int], max_length: int, max_prompt_length: int, overlong: str
) -> Outcome:
    prompt_length, total_length = tokenised.spans[0][0], len(tokenised.ids)
    cut_prompt = prompt_length > max_prompt_length
    gone = prompt_length - len(prompt)
    ids = prompt + tokenised.ids[prompt_length:]
    cut_response = len(ids) > max_length
    if overlong == "drop" and (cut_prompt or total_length > max_length):
        return Outcome(None, prompt_length, total_length)
    # Tokens after the last trained one cost time and teach nothing.
    ids = ids[: min(max_length, tokenised.spans[-1][1] - gone)]
    labels = [IGNORE_INDEX] * len(ids)
    answers = tuple((min(start - gone, len(ids)), min(stop - gone, len(ids))) for start, stop in tokenised.spans)
    for start, stop in answers:
        labels[start:stop] = ids[start:stop]
    trained = sum(max(0, stop - max(start, 1)) for start, stop in answers)
    # Nothing predicts position 0, so a label there trains nothing.
    encoded = Encoded(ids, labels, row.id) if trained else None
    return Outcome(
        encoded, prompt_length, total_length, cut_prompt, cut_response, tokenised.kept_border, answers=answers
    )


def _with_images(outcome: Outcome, row: Row, tokenised: Tokenised, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """Return the outcome with the row's images; a row that lost some of their tokens is a problem."""
    if not row.images or outcome.encoded is None:
        return outcome
    try:
        images = row_images(row, tokenizer)
        assert images is not None
        _check_images(row, images.reader, outcome.encoded.input_ids, tokenised.ids)
    except (RowError, ImageError) as error:
        problem = error if isinstance(error, RowError) else RowError(f"{row.label}: {error}")
        return replace(outcome, encoded=None, problem=problem)
    return replace(outcome, encoded=replace(outcome.encoded, images=images))


def _check_images(row: Row, reader: ImageReader, kept: list[int], whole: list[int]) -> None:
    """Raise a RowError if cutting took away tokens that stand for images."""
    tokens = whole.count(reader.token_id)
    if kept.count(reader.token_id) < tokens:
        raise RowError(
            f"{row.label} has {len(whole)} tokens, {tokens} of them for its images, which can't be cut; raise "
            "data.max_prompt_length and data.max_length, give smaller images, or set data.overlong=drop"
        )


def encode_prompt(
    row: Row, template: Template, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> list[int]:
    """Return the prompt's tokens for generation: the same as in training, cut to ``max_prompt_length``.

    In a conversation, the prompt is everything before the last answer; training limits only its first prompt.

    An overlong prompt loses tokens before the template's tail, which stays whole. An instruction keeps its beginning;
    a conversation, and every prompt of a chat template, keeps its end, where the last question is. BOS stays.

    Raises:
        ValueError: the limit leaves no room for the template's tail, or the template rejects the row.
    """
    return encode_prompts([row], template, tokenizer, max_prompt_length)[0][0]


def encode_prompts(
    rows: Sequence[Row], template: Template, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> tuple[list[list[int]], int]:
    """Return the tokens of many prompts, each as from ``encode_prompt``, and the number of prompts cut.

    Raises:
        ValueError: as ``encode_prompt``; one error lists all rows that the template rejects.
    """
    encoder = TextEncoder(tokenizer)
    problems = Problems("prompts")
    texts = []
    for row in rows:
        with problems.noting(RowError):
            texts.append(_one_text(row, template, encoder, _prompt_segments))
    problems.raise_any()
    found, cut = [], 0
    for row, text, tokenised in zip(rows, texts, tokenise(texts, encoder), strict=True):
        with problems.noting(RowError):
            if isinstance(tokenised, TextError):
                raise _row_error(row, tokenised, encoder)
            kept = _cut(_Prompt(tokenised.ids, text.text), row, template, encoder, max_prompt_length)
            if row.images:
                _check_images(row, reader_beside(tokenizer), kept, tokenised.ids)
            cut += len(kept) < len(tokenised.ids)
            found.append(kept)
    problems.raise_any()
    return found, cut


def _prompt_segments(row: Row, template: Template) -> list[Segment]:
    try:
        segments = template.render(row)
    except HistoryError:
        # Such rows are trained one answer at a time, each after the history as rendered at that turn.
        segments = template.render(only_last_answer(row))
    answers = [number for number, segment in enumerate(segments) if segment.trained]
    return segments[: answers[-1]] if answers else segments


@dataclass(frozen=True, slots=True)
class _Prompt:
    ids: list[int]
    text: str


def _cut(prompt: _Prompt, row: Row, template: Template, encoder: TextEncoder, max_prompt_length: int) -> list[int]:
    """Return a prompt's tokens, cut if there are too many; see ``encode_prompt``.

    Raises:
        ValueError: the tail fills the whole limit.
    """
    ids = prompt.ids
    if len(ids) <= max_prompt_length:
        return ids
    tail = template.tail(row)
    if not tail or prompt.text == tail or not prompt.text.endswith(tail):
        # A prompt without the template's tail: keep its end, from which the answer continues.
        return _keep_end(ids, encoder.tokenizer, max_prompt_length)
    kept = encoder.last_tokens(prompt.text, tail)
    begun = int(template.keeps_end(row) and ids[0] == encoder.tokenizer.bos_token_id)
    if kept + begun >= max_prompt_length:
        raise ValueError(
            f"data.max_prompt_length = {max_prompt_length} leaves no room before the end of the template, {tail!r}, of "
            f"{kept} tokens; raise it"
        )
    if template.keeps_end(row):
        return _keep_end(ids, encoder.tokenizer, max_prompt_length)
    return ids[: max_prompt_length - kept] + ids[len(ids) - kept :]


def _keep_end(ids: list[int], tokenizer: PreTrainedTokenizerBase, room: int) -> list[int]:
    bos = ids[:1] if room > 1 and ids[0] == tokenizer.bos_token_id else []
    return bos + ids[len(ids) - room + len(bos) :]


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
