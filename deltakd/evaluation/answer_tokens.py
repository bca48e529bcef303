"""The trained tokens of a row: text, position in the answer, class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from deltakd.data import Encoded
from deltakd.evaluation.token_groups import token_class
from deltakd.types import IGNORE_INDEX


@dataclass(frozen=True)
class AnswerToken:
    """A trained token of a row.

    Args:
        id: its id in the vocabulary.
        index: its index in the row.
        position: its position in the answer, from 0; restarts with every answer of a conversation.
        text: its text in context, with its leading space.
        kind: its class, one of ``deltakd.evaluation.token_groups.CLASSES``.
    """

    id: int
    index: int
    position: int
    text: str
    kind: str


class Pieces:
    """Decodes token ids as they appear within a text, where a token keeps its leading space.

    Args:
        tokenizer: decodes the ids; special tokens are kept.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._front = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._skipped = len(self._decode([]))
        self._known: dict[int, str] = {}
        self.special = frozenset(tokenizer.all_special_ids)

    def __getitem__(self, token: int) -> str:
        """Return the token's text; U+FFFD for part of a character."""
        if token not in self._known:
            self._known[token] = self._decode([token])[self._skipped :]
        return self._known[token]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(self._front + ids, clean_up_tokenization_spaces=False))

    def answer(self, row: Encoded) -> Iterator[AnswerToken]:
        """Yield the row's trained tokens in order, as in ``Batch.labels_N``."""
        position = 0
        for index in range(1, len(row.labels)):
            token = row.labels[index]
            if token == IGNORE_INDEX:
                position = 0
                continue
            text = self[token]
            kind = token_class(text, self[row.input_ids[index - 1]], token in self.special)
            yield AnswerToken(token, index, position, text, kind)
            position += 1
