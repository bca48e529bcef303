"""Control tokens within data are plain text: a question about ``<|im_end|>`` does not end the turn.

Before a row is rendered, a stand-in of equal length replaces each control token in its data, so only the template
writes control tokens into the rendered text. A second tokenizer then tokenises the text. It differs from the first only
in the names of its control tokens, so those in the data are ordinary text to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from deltakd.data.sources.rows import Row, RowError, is_answer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

#: Private characters, one per control token: the first stand-in for data, and the first of the second tokenizer.
_DATA, _TEMPLATE = 0x100000, 0x108000
_PRIVATE = re.compile("[\U00100000-\U0010fffd]")
#: A run of one of them in a message, verbatim or as Python escapes it.
_WRITTEN = re.compile(r"(\\U0010[0-9a-f]{4}|[\U00100000-\U0010fffd])\1*")
#: How templates write control tokens, special or not: <|user|>, <｜User｜>.
_BARRED = re.compile(r"<[|｜].*[|｜]>")

_renamed: WeakKeyDictionary[PreTrainedTokenizerBase, Renamed] = WeakKeyDictionary()


class ControlTokens:
    """A tokenizer's control tokens, and how to tokenise data that contains them.

    Control tokens are special tokens, and tokens written with bars (``<|user|>``). Other added tokens, such as
    ``<think>``, are words that answers may use.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._eos = str(tokenizer.eos_token)
        added = tokenizer.added_tokens_decoder
        known = {token.content: id for id, token in added.items() if token.special or _BARRED.fullmatch(token.content)}
        known |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self._ids = {text: id for text, id in known.items() if text}
        self._control_ids = set(self._ids.values()) - {tokenizer.unk_token_id}
        self._names = list(self._ids)
        self._numbers = {text: number for number, text in enumerate(self._ids)}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def guarded(self, row: Row) -> tuple[Row, bool]:
        """Return the row with stand-ins for the control tokens in its data, and True if there were any.

        A verbatim prompt keeps its control tokens: it is a template that the user has written out. An EOS that closes
        an answer is removed, since every answer gets one.

        Raises:
            RowError: the data already contains stand-in characters, or the tokenizer can't write control tokens as
                text.
        """
        row = self._without_eos(row)
        if not any(map(self._pattern.search, _texts(row))):
            return row, False
        self._check(row.label, (*_texts(row), row.prompt or ""))
        return _mapped(row, lambda text: self._pattern.sub(self._stand_in(_DATA), text)), True

    def guarded_text(self, text: str) -> tuple[str, bool]:
        """As ``guarded``, for plain text, all of which is data."""
        if not self._pattern.search(text):
            return text, False
        self._check(f"the document that begins with {text[:40]!r}", (text,))
        return self._pattern.sub(self._stand_in(_DATA), text), True

    def _check(self, what: str, texts: tuple[str, ...]) -> None:
        if any(map(_PRIVATE.search, texts)):
            raise RowError(
                f"{what} holds a control token of the tokenizer and a private character above U+100000; remove one of "
                "them"
            )
        if own_backend(self._tokenizer) is None:
            found = next(match[0] for match in map(self._pattern.search, texts) if match)
            raise RowError(
                f"{what} holds the control token {found!r}, which {type(self._tokenizer).__name__} can't write as "
                "text; remove it, or use a fast tokenizer"
            )

    def ids(self, texts: list[str], add_special: bool) -> list[list[int]]:
        """Return the ids of rendered texts, in which the stand-ins for control tokens in data become text."""
        renamed = _renamed.get(self._tokenizer)
        if renamed is None or renamed.names != tuple(self._ids):
            renamed = _renamed[self._tokenizer] = Renamed(self._tokenizer, tuple(self._ids), self._stand_in(_TEMPLATE))
        texts = [self._restored(self._pattern.sub(self._stand_in(_TEMPLATE), text)) for text in texts]
        return renamed.ids(texts, add_special)

    def readable(self, message: str) -> str:
        """Return a message about a guarded row with the original control tokens in place of their stand-ins."""

        def name(match: re.Match[str]) -> str:
            number = int(match[1][2:], 16) if match[1][0] == "\\" else ord(match[1])
            return self._names[number - _DATA] if number - _DATA < len(self._names) else match[0]

        return _WRITTEN.sub(name, message)

    def count(self, text: str) -> int:
        """Return the number of control tokens that the template wrote into a rendered text; UNK does not count."""
        return sum(match[0] != self._tokenizer.unk_token for match in self._pattern.finditer(text))

    def is_control(self, id: int) -> bool:
        """Return True for the id of a control token, except UNK, which represents any text."""
        return id in self._control_ids

    def _restored(self, text: str) -> str:
        for character in set(_PRIVATE.findall(text)):
            number = ord(character) - _DATA
            if number < len(self._names):
                name = self._names[number]
                text = text.replace(character * len(name), name)
        return text

    def _stand_in(self, first: int) -> Callable[[re.Match[str]], str]:
        return lambda match: chr(first + self._numbers[match[0]]) * len(match[0])

    def _without_eos(self, row: Row) -> Row:
        if row.messages is None:
            if not any(text.endswith(self._eos) for text in row.responses):
                return row
            return replace(row, responses=tuple(text.removesuffix(self._eos) for text in row.responses))
        if not any(is_answer(turn) and str(turn["content"]).endswith(self._eos) for turn in row.messages):
            return row
        turns = [
            turn | {"content": turn["content"].removesuffix(self._eos)}
            if is_answer(turn) and isinstance(turn["content"], str)
            else turn
            for turn in row.messages
        ]
        return replace(row, messages=tuple(turns))


def without_private(text: str) -> str:
    """Return a text with U+FFFD in place of the private characters of which stand-ins are made."""
    return _PRIVATE.sub("\ufffd", text)


def own_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the Rust tokenizer behind this one; None if Python code affects how texts become ids."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    kind = type(tokenizer)
    own = kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    return tokenizer.backend_tokenizer if own and kind.__call__ is PreTrainedTokenizerFast.__call__ else None


class Renamed:
    """A fast tokenizer with renamed control tokens and unchanged ids.

    Args:
        tokenizer: the one to copy.
        names: the control tokens.
        stand_in: returns the new name for a match.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...], stand_in: Callable[[re.Match[str]], str]
    ) -> None:
        self.names = names
        new = {name: re.sub(re.escape(name), stand_in, name) for name in names}
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        ids = {token["content"]: token["id"] for token in state["added_tokens"]}
        _rename(state, new)
        self._backend = _loaded(state)
        renamed = {self._backend.token_to_id(new.get(name, name)): id for name, id in ids.items()}
        self._original = {there: here for there, here in renamed.items() if there is not None and there != here}

    def ids(self, texts: list[str], add_special: bool) -> list[list[int]]:
        """Return the texts' ids in the copied tokenizer."""
        found = [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=add_special)]
        return [[self._original.get(id, id) for id in ids] for ids in found] if self._original else found


def _loaded(state: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(state))


def _rename(state: dict[str, Any], new: dict[str, str]) -> None:
    """Rename tokens of a serialised tokenizer, in its list of added tokens and in its model."""
    state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new.get(piece, piece): id for piece, id in model["vocab"].items()}
    else:
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        # A merge that turns text into a control token is exactly what must not happen.
        model["merges"] = [merge for merge in model["merges"] if not new.keys() & _merge_pieces(merge)]
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]


def _merge_pieces(merge: str | list[str]) -> set[str]:
    pieces = merge.split(" ") if isinstance(merge, str) else merge
    return {*pieces, "".join(pieces)}


def _texts(row: Row) -> Iterable[str]:
    """Yield all texts of a row's data, except a verbatim prompt."""
    yield from (row.instruction, row.input, *row.responses)
    for message in row.messages or ():
        yield from _strings(message)
    for tool in row.tools or ():
        yield from _strings(tool)


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, held in value.items():
            yield key
            yield from _strings(held)
    elif isinstance(value, list):
        for held in value:
            yield from _strings(held)


def _mapped(row: Row, change: Callable[[str], str]) -> Row:
    def deep(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {change(key): deep(held) for key, held in value.items()}
        return [deep(held) for held in value] if isinstance(value, list) else value

    return replace(
        row,
        instruction=change(row.instruction),
        input=change(row.input),
        responses=tuple(map(change, row.responses)),
        messages=None if row.messages is None else tuple(map(deep, row.messages)),
        tools=None if row.tools is None else tuple(map(deep, row.tools)),
    )
