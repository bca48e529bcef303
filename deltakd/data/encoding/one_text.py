"""Tokenises a row's prompt and answers as one text, then locates each of them in the tokens.

Training must match generation, which tokenises the prompt alone. A row's ids therefore always begin with exactly the
ids of its prompt, and the answer's tokens are those that follow in the joined text. No answer begins with a dummy
prefix (SentencePiece) or a new word (WordPiece).

A tokenizer may merge the end of a prompt with the beginning of an answer, or tokenise the prompt's end differently once
more text follows (GPT-2's does with two line breaks). Such a token can't be trained: in generation, the model never
gets to write it. The border is then kept: the prompt keeps its own ids, and the answer gets the ids of a text that
follows another one. ``Tokenised.kept_border`` records this. The same holds for each answer of a conversation. A token
that straddles the *end* of an answer other than the last belongs to the answer: the model ends its turn with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltakd.data.encoding.segments import Segment
from deltakd.data.encoding.tokens import Request, TextEncoder


@dataclass(frozen=True, slots=True)
class OneText:
    """A row's segments, joined.

    Args:
        text: the joined text, with EOS after each closed answer that is not the last segment.
        add_special: let the tokenizer add its special tokens (BOS).
        spans: [start, stop) of each trained segment in the text.
        closed: EOS ends the tokens.
        guarded: the text has stand-ins for control tokens (``ControlTokens.guarded``).
    """

    text: str
    add_special: bool
    spans: tuple[tuple[int, int], ...]
    closed: bool
    guarded: bool


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A text's tokens.

    Args:
        ids: T token ids.
        spans: [start, stop) of each trained segment in ``ids``.
        kept_border: True if a merge over the beginning of an answer was undone.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    kept_border: bool


class TextError(ValueError):
    """The tokenizer merges a prompt with its answer, or data into a control token, and this can't be prevented."""


def join(segments: Sequence[Segment], encoder: TextEncoder, guarded: bool = False) -> OneText:
    """Join a row's segments into one text."""
    text, spans = "", []
    last = len(segments) - 1
    for number, segment in enumerate(segments):
        start = len(text)
        text += segment.text
        if segment.closed and number < last and not segment.text.endswith(encoder.eos):
            text += encoder.eos
        if segment.trained:
            spans.append((start, len(text)))
    add_special = bool(segments) and segments[0].special_tokens and not (encoder.bos and text.startswith(encoder.bos))
    return OneText(text, add_special, tuple(spans), bool(segments) and segments[-1].closed, guarded)


def tokenise(texts: Sequence[OneText], encoder: TextEncoder) -> list[Tokenised | TextError]:
    """Tokenise many texts with one call of the tokenizer.

    Returns:
        Each text's tokens, or its error.
    """
    requests = [Request(one.text, one.add_special, one.guarded) for one in texts]
    checks = [_checks(one, encoder, requests) for one in texts]
    ids = encoder.ids(requests)
    found: list[Tokenised | TextError] = []
    for number, one in enumerate(texts):
        whole = ids[number]
        spans = _spans(one, whole, checks[number], ids, encoder)
        try:
            tokenised = _one_by_one(one, encoder) if spans is None else Tokenised(whole, spans, False)
            _check_data(one, tokenised.ids, encoder)
        except TextError as error:
            found.append(error)
            continue
        _close(tokenised, one, encoder)
        found.append(tokenised)
    return found


@dataclass(frozen=True, slots=True)
class _Check:
    """A check that the text before a border has the same tokens alone as in the whole text.

    Args:
        request: number of the text before the border, among the texts to tokenise.
        mark: the mark of the text (``TextEncoder.marks``) at which it begins; -1: the beginning of the text.
        marks: number of marks in the text.
    """

    request: int
    mark: int
    marks: int


def _checks(one: OneText, encoder: TextEncoder, requests: list[Request]) -> list[_Check]:
    """Return a check for the beginning of each trained span, and for its end if text follows it."""
    borders = [border for span in one.spans for border in span]
    if borders and borders[-1] == len(one.text):
        borders.pop()
    if not borders:
        return []
    found = list(encoder.marks.finditer(one.text)) if encoder.marks else []
    checks, mark = [], -1
    for border in borders:
        while mark + 1 < len(found) and found[mark + 1].end() <= border:
            mark += 1
        start = found[mark].start() if mark >= 0 else 0
        checks.append(_Check(len(requests), mark, len(found)))
        requests.append(Request(one.text[start:border], one.add_special and mark < 0, one.guarded))
    return checks


def _spans(
    one: OneText, whole: list[int], checks: list[_Check], ids: list[list[int]], encoder: TextEncoder
) -> list[tuple[int, int]] | None:
    """Return the trained spans within the whole text's tokens; None if a border is not between two tokens."""
    places: list[int] = []
    marks: list[int] | None = None
    for check in checks:
        base = 0
        if check.mark >= 0:
            if marks is None:
                marks = [place for place, token in enumerate(whole) if token in encoder.mark_ids]
            front = whole[: encoder.added_around[0]] if one.add_special else []
            extra = sum(token in encoder.mark_ids for token in front)
            if len(marks) != check.marks + extra:
                return None
            base = marks[check.mark + extra]
        before = ids[check.request]
        place = base + len(before)
        if whole[base:place] != before:
            return None
        places.append(place)
    if len(places) < 2 * len(one.spans):
        places.append(len(whole))
    return list(zip(places[::2], places[1::2], strict=True))


def _one_by_one(one: OneText, encoder: TextEncoder) -> Tokenised:
    """As ``tokenise``, border by border, keeping each border that is not between two tokens."""
    # The tokens settled so far, and where in the text they end.
    settled: list[int] = []
    at = 0

    def up_to(stop: int) -> list[int]:
        if not at:
            return encoder.one(one.text[:stop], one.add_special, one.guarded)
        after = encoder.following(one.text[at:stop], one.guarded)
        if after is None:
            raise TextError(
                f"the tokenizer merges the end of the prompt, {one.text[:at][-20:]!r}, with the beginning of the "
                f"answer, {one.text[at : at + 20]!r}, whatever stands between them"
            )
        return settled + after

    whole, kept = up_to(len(one.text)), False
    starts: list[int] = []
    stops: list[int] = []
    for number, (start, _) in enumerate(one.spans):
        before = up_to(start)
        if number:
            stops.append(_covering(before, up_to(one.spans[number - 1][1])))
        if whole[: len(before)] != before:
            settled, at, kept = before, start, True
            whole = up_to(len(one.text))
        starts.append(len(before))
    if starts:
        stop = one.spans[-1][1]
        stops.append(_covering(whole, up_to(stop)) if stop < len(one.text) else len(whole))
    return Tokenised(whole, list(zip(starts, stops, strict=True)), kept)


def _check_data(one: OneText, ids: list[int], encoder: TextEncoder) -> None:
    if not one.guarded:
        return
    written = encoder.control.count(one.text) + (sum(encoder.added_around) if one.add_special else 0)
    if sum(map(encoder.control.is_control, ids)) > written:
        raise TextError("the tokenizer turns text of the row into a control token; take it out of the data")


def _covering(whole: list[int], part: list[int]) -> int:
    """Return the number of leading tokens of the whole that cover its first part."""
    common = next((n for n, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), min(len(whole), len(part)))
    return common if common == len(part) else min(common + 1, len(whole))


def _close(tokenised: Tokenised, one: OneText, encoder: TextEncoder) -> None:
    if one.closed and tokenised.ids[-1:] != [encoder.end]:
        tokenised.ids.append(encoder.end)
        if one.spans and one.spans[-1][1] == len(one.text):
            tokenised.spans[-1] = (tokenised.spans[-1][0], len(tokenised.ids))
