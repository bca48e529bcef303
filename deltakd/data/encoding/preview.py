"""One training row as text with the trained part marked, which shows most mistakes in templates and data."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from deltakd.data.encoding.encoded_set import Encoded
from deltakd.types import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How the log shows the first training row: its text, its tokens with their ids, or not at all.
Preview = Literal["text", "ids", "none"]

#: Maximum characters of a stretch of text; longer ones lose their middle.
TEXT_LIMIT = 480
#: Maximum tokens of a stretch that are listed with their ids.
IDS_LIMIT = 48
#: Maximum stretches shown of a conversation with many turns.
STRETCH_LIMIT = 6

#: Tokens before a piece that it is decoded with.
_CONTEXT = 8
#: The result of decoding an incomplete character.
_UNFINISHED = "\ufffd"
#: Replaces a space within a token, where spaces separate the tokens.
_SPACE = "␣"
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


@dataclass(frozen=True)
class Marks:
    """The marks before and after the trained part."""

    before: str
    after: str


#: For files, pipes and notebooks.
BRACKETS = Marks("⟦", "⟧")
#: For terminals: bold green.
COLOUR = Marks("\x1b[1;32m", "\x1b[0m")


@dataclass(frozen=True)
class _Stretch:
    """Consecutive tokens ``start:stop`` of a row, either all trained or all untrained."""

    start: int
    stop: int
    trained: bool


def preview_row(row: Encoded, tokenizer: PreTrainedTokenizerBase, *, ids: bool, marks: Marks) -> str:
    r"""Return the row's tokens as text, each trained stretch between the marks, without line breaks.

    White space and control characters are escaped (``\n``), and backslashes in the data are doubled. The middle of
    long stretches and long conversations is left out, and counted.

    Args:
        row: the row as it is trained.
        tokenizer: decodes it.
        ids: True lists the tokens, each with its id.
        marks: written around trained stretches.
    """
    shown = []
    for stretch in _stretches(row):
        text = (_with_ids if ids else _as_text)(row.input_ids, stretch, tokenizer)
        shown.append(f"{marks.before}{text}{marks.after}" if stretch.trained else text)
    left_out = len(shown) - STRETCH_LIMIT
    if left_out > 0:
        half = STRETCH_LIMIT // 2
        shown = [*shown[:half], f" … {left_out} more stretches … ", *shown[-half:]]
    return (" " if ids else "").join(shown)


def count_trained(row: Encoded) -> int:
    """Return the number of tokens that the model learns to write; nothing predicts the first one."""
    return sum(label != IGNORE_INDEX for label in row.labels[1:])


def _stretches(row: Encoded) -> list[_Stretch]:
    trained = [False, *(label != IGNORE_INDEX for label in row.labels[1:])]
    found = []
    for learnt, group in groupby(enumerate(trained), key=lambda one: one[1]):
        places = [at for at, _ in group]
        found.append(_Stretch(places[0], places[-1] + 1, learnt))
    return found


def _decoded(ids: list[int], start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the part of the text from tokens ``start:stop``; some tokenizers decode them differently alone."""
    first = max(0, start - _CONTEXT)
    before, whole = (str(tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False)) for end in (start, stop))
    # A character of several tokens decodes to a replacement until its last token, and so belongs to that token.
    before = before.rstrip(_UNFINISHED)
    whole = whole if stop == len(ids) else whole.rstrip(_UNFINISHED)
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False))


def _as_text(ids: list[int], stretch: _Stretch, tokenizer: PreTrainedTokenizerBase) -> str:
    text = _decoded(ids, stretch.start, stretch.stop, tokenizer)
    left_out = len(text) - TEXT_LIMIT
    if left_out <= 0:
        return _escaped(text)
    half = TEXT_LIMIT // 2
    return f"{_escaped(text[:half])} … {left_out:,} more characters … {_escaped(text[-half:])}"


def _with_ids(ids: list[int], stretch: _Stretch, tokenizer: PreTrainedTokenizerBase) -> str:
    places = range(stretch.start, stretch.stop)
    half, left_out = IDS_LIMIT // 2, len(places) - IDS_LIMIT
    parts = [places] if left_out <= 0 else [places[:half], places[-half:]]
    listed = [
        " ".join(f"{_escaped(_decoded(ids, at, at + 1, tokenizer)).replace(' ', _SPACE)}({ids[at]})" for at in part)
        for part in parts
    ]
    return f" … {left_out:,} more tokens … ".join(listed)


def _escaped(text: str) -> str:
    return "".join(_ESCAPES.get(char) or (char if _prints(char) else _code(char)) for char in text)


def _prints(char: str) -> bool:
    return char == " " or unicodedata.category(char)[0] not in "CZ"


def _code(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"
