"""The bytes that each token of a vocabulary stands for, and the tokens that end an answer.

A text is held as a ``str`` with one character per byte (Latin-1), so that tokens that are parts of a UTF-8 character
can be cut, compared and joined like any others. Characters above U+00FF stand for tokens without bytes: an answer's end
and other control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, final

from deltakd.data.encoding.control_tokens import ControlTokens
from deltakd.data.encoding.segments import Template
from deltakd.data.encoding.tokens import eos_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Stands for the token that ends an answer: one event in both models, whatever the token is called.
END = "\ue000"
#: Tokens besides EOS with which chat templates end a turn.
TURN_ENDS = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|end_of_turn|>", "<|eom_id|>"}
)
#: A byte of SentencePiece's byte fallback.
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: SentencePiece's space.
_SPACE = "\u2581"


class UnalignableError(ValueError):
    """A tokenizer's tokens can't be aligned with another one's; the message names it and the reason."""


@final
class TokenTexts:
    """The text of each token of a tokenizer.

    Args:
        tokenizer: byte-level BPE (GPT-2, Llama 3, Qwen) or SentencePiece's kinds (Llama 2, Gemma, Mistral).
        unknown: a character above U+00FF for control tokens that do not end an answer; each side of an alignment has
            its own, so that they never match.

    Raises:
        UnalignableError: it does not keep the bytes of a text (WordPiece), or hides them (no fast tokenizer).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, unknown: str) -> None:
        self._tokenizer = tokenizer
        self._unknown = unknown
        self._control = ControlTokens(tokenizer)
        self._is_byte_level = _is_byte_level(tokenizer)
        self._texts: dict[int, str] = {}

    def of(self, ids: Iterable[int]) -> list[str]:
        """Return the text of each token, one character per byte."""
        texts = self._texts
        return [texts[token] if token in texts else self._make(token) for token in ids]

    @cached_property
    def ends(self) -> frozenset[int]:
        """The ids of the tokens that end an answer."""
        names = {token: name.content for token, name in self._tokenizer.added_tokens_decoder.items()}
        return frozenset({eos_id(self._tokenizer), *(token for token, name in names.items() if name in TURN_ENDS)})

    def end_in(self, template: Template) -> int:
        """Return the token with which a template ends an answer."""
        written = repr(template)
        added = self._tokenizer.added_tokens_decoder
        named = [token for token in self.ends if token in added and added[token].content in written]
        # A template that writes its own ends, as chat templates do, may end a turn with another token than EOS.
        own = eos_id(self._tokenizer)
        return own if own in named or not named else min(named)

    def is_control(self, token: int) -> bool:
        """Return True for a token without bytes."""
        return self.of([token])[0] in (END, self._unknown)

    def vocabulary(self) -> Iterator[tuple[int, str, bool]]:
        """Yield id, text, and True if the token is one byte of a byte fallback, for tokens that have bytes."""
        for name, token in self._tokenizer.get_vocab().items():
            text = self.of([token])[0]
            if text and text not in (END, self._unknown):
                yield token, text, not self._is_byte_level and _BYTE.fullmatch(name) is not None

    def _make(self, token: int) -> str:
        self._texts[token] = text = self._text_of(token)
        return text

    def _text_of(self, token: int) -> str:
        if token in self.ends:
            return END
        if self._control.is_control(token) or token == self._tokenizer.unk_token_id:
            return self._unknown
        added = self._tokenizer.added_tokens_decoder.get(token)
        if added is not None:
            return added.content.encode().decode("latin-1")
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return self._unknown
        if self._is_byte_level:
            letters = _letters()
            if all(letter in letters for letter in name):
                return "".join(letters[letter] for letter in name)
            return name.encode().decode("latin-1")
        byte = _BYTE.fullmatch(name)
        if byte is not None:
            return chr(int(byte[1], 16))
        return name.replace(_SPACE, " ").encode().decode("latin-1")


@cache
def _letters() -> dict[str, str]:
    """Return byte-level BPE's letter for each byte -> the byte as a character."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: chr(byte) for byte, letter in bytes_to_unicode().items()}


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True for byte-level BPE, False for SentencePiece's kinds. Raise an UnalignableError for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if backend is None:
        raise UnalignableError(
            f"the tokenizer {name} ({type(tokenizer).__name__}) is not a fast tokenizer, so the bytes of its tokens "
            "are not known; give a model that comes with a tokenizer.json"
        )
    state = json.loads(backend.to_str())
    kinds = [part["type"] for key in ("decoder", "pre_tokenizer") for part in _parts(state[key])]
    if "ByteLevel" in kinds:
        return True
    spaces = [part for part in _parts(state["normalizer"]) if part["type"] == "Replace" and part["content"] == _SPACE]
    if "Metaspace" in kinds or spaces:
        return False
    found = f"{state['model']['type']}, decoder {(state['decoder'] or {}).get('type')}"
    raise UnalignableError(
        f"the tokenizer {name} ({found}) does not keep the bytes of a text, so its tokens can't be aligned with those "
        "of another one; byte-level BPE and SentencePiece's kinds can"
    )


def _parts(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the parts of a normalizer, pre-tokenizer or decoder, out of their sequences."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [
        part
        for key in ("normalizers", "pretokenizers", "decoders")
        for inner in node.get(key) or ()
        for part in _parts(inner)
    ]
