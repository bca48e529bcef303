"""From texts to token ids, many at a time: special tokens, and text that continues other text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from deltakd.data.encoding.control_tokens import ControlTokens, own_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Texts to put before a text that continues another one, tried in turn until one does not merge with it.
_ANCHORS = ("\n", ":", "a", "0", "。", " ")


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the EOS token. Raise a ValueError if the tokenizer has none."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("the tokenizer has no EOS token, so a model could not learn to stop; set tokenizer.eos_token")
    return tokenizer.eos_token_id


class Request(NamedTuple):
    """A text to tokenise.

    Args:
        text: the text.
        add_special: let the tokenizer add its special tokens (BOS).
        guarded: the text has stand-ins for control tokens (``ControlTokens.guarded``).
    """

    text: str
    add_special: bool = False
    guarded: bool = False


class TextEncoder:
    """A tokenizer as encoding uses it: many texts a call, no padding, no truncation, no closing EOS.

    Args:
        tokenizer: must have an EOS token.

    Raises:
        ValueError: there is no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.end = eos_id(tokenizer)
        self.eos = str(tokenizer.eos_token)
        self.bos = str(tokenizer.bos_token or "")
        self._backend = own_backend(tokenizer)

    @cached_property
    def marks(self) -> re.Pattern[str] | None:
        """Matches the tokens at which the tokenizer splits a text first of all; None: none are known.

        The text between two of them is tokenised separately.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        return alternation([token.content for token in added if not token.normalized and not token.single_word])

    @cached_property
    def mark_ids(self) -> frozenset[int]:
        """The ids of the tokens that ``marks`` matches."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(id for id, token in added if not token.normalized and not token.single_word)

    @cached_property
    def added_around(self) -> tuple[int, int]:
        """Number of special tokens that the tokenizer writes before and after a text."""
        [plain], [around] = self._call(["a"], False), self._call(["a"], True)
        front = next((n for n in range(len(around)) if around[n : n + len(plain)] == plain), 0)
        return front, len(around) - front - len(plain)

    @cached_property
    def control(self) -> ControlTokens:
        """The tokenizer's control tokens."""
        return ControlTokens(self.tokenizer)

    def ids(self, requests: Sequence[Request]) -> list[list[int]]:
        """Return the ids of each text.

        An EOS that the tokenizer adds to every text is left out, since rows are closed elsewhere.
        """
        found: list[list[int]] = [[] for _ in requests]
        for kind in sorted({request[1:] for request in requests}):
            chosen = [number for number, request in enumerate(requests) if request[1:] == kind]
            for number, ids in zip(chosen, self._alike([requests[n].text for n in chosen], *kind), strict=True):
                found[number] = ids
        return found

    def one(self, text: str, add_special: bool = False, guarded: bool = False) -> list[int]:
        """Return the ids of one text."""
        return self.ids([Request(text, add_special, guarded)])[0]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of plain texts, in which control tokens count as ordinary text.

        Raises:
            ValueError: a text holds control tokens that can't be written as text (``ControlTokens.guarded``).
        """
        return self.ids([Request(guarded, guarded=held) for guarded, held in map(self.control.guarded_text, texts)])

    def following(self, text: str, guarded: bool = False) -> list[int] | None:
        """Return the ids of a text that follows other text, without merging with it.

        At the start of a text, SentencePiece adds a space and WordPiece begins a word; after other text, they do not.

        Returns:
            The ids, or None if the text merges with every prefix tried.
        """
        for anchor in _ANCHORS:
            before = self.one(anchor)
            both = self.one(anchor + text, guarded=guarded)
            if both[: len(before)] == before:
                return both[len(before) :]
        return None

    def last_tokens(self, text: str, tail: str) -> int:
        """Return how many of the text's last tokens contain its tail, including a token that straddles the border."""
        if not self.tokenizer.is_fast:
            return len(self.one(tail))
        border = len(text) - len(tail)
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return sum(stop > border for _, stop in spans["offset_mapping"])

    def _alike(self, texts: list[str], add_special: bool, guarded: bool) -> list[list[int]]:
        closes = add_special and self.added_around[1] > 0
        written = [closes and text.endswith(self.eos) for text in texts]
        if closes:
            texts = [text.removesuffix(self.eos) for text in texts]
        found = (self.control.ids if guarded else self._call)(texts, add_special)
        if closes:
            for ids, end in zip(found, written, strict=True):
                if ids[-1] == self.end and not end:
                    ids.pop()
        return found

    def _call(self, texts: list[str], special: bool) -> list[list[int]]:
        if self._backend is None:
            return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]]
        # Left over from the tokenizer's last call.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        # Without offsets and a dictionary per text, this takes a third of the time.
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=special)]


def alternation(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches these texts, the longest first; None if there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
