"""Rows in two tokenizers: the student's, and the teachers' with a template of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from deltakd.data.encoding.align import align, from_first_letter
from deltakd.data.encoding.encode import Outcome, encode_batch
from deltakd.data.encoding.encoded_set import Encoded
from deltakd.data.encoding.segments import Template
from deltakd.data.encoding.token_cache import tokenizer_fingerprint
from deltakd.data.encoding.token_map import make_token_map
from deltakd.data.encoding.token_texts import TokenTexts
from deltakd.data.sources.rows import Row, RowError
from deltakd.types import UNALIGNED, TokenMap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Stand for control tokens that end no answer; they differ, so that those of one side never match the other's.
_OURS, _THEIRS = "\ue001", "\ue002"


@dataclass(frozen=True)
class Coding:
    """How rows become tokens.

    Args:
        template: renders them.
        tokenizer: must have an EOS token.
        max_length, max_prompt_length, overlong: as for ``encode_batch``.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int
    overlong: str = "cut"

    def encode(self, rows: Sequence[Row]) -> list[Outcome]:
        """Tokenise rows; see ``encode_batch``."""
        return encode_batch(rows, self.template, self.tokenizer, self.max_length, self.max_prompt_length, self.overlong)

    @property
    def identity(self) -> list[object]:
        """Everything that the tokens of a row depend on."""
        limits = [self.max_length, self.max_prompt_length, self.overlong]
        return [tokenizer_fingerprint(self.tokenizer), repr(self.template), limits]


@final
class TwoTokenizers:
    """Encodes rows for a student and for teachers with another tokenizer, and aligns their answers by bytes.

    Each side has its own template and limits; only the answers' text is aligned, and their ends with each other.

    Args:
        student, teachers: how rows become tokens of each side.

    Raises:
        UnalignableError: a tokenizer does not keep the bytes of a text.
    """

    def __init__(self, student: Coding, teachers: Coding) -> None:
        self.student = student
        self.teachers = teachers
        self._texts = (TokenTexts(student.tokenizer, _OURS), TokenTexts(teachers.tokenizer, _THEIRS))

    def encode(self, rows: Sequence[Row]) -> list[Outcome]:
        """Tokenise rows for both sides; one that either side drops is dropped."""
        return [
            self._paired(ours, theirs)
            for ours, theirs in zip(self.student.encode(rows), self.teachers.encode(rows), strict=True)
        ]

    def token_map(self, vocabulary: int, other_vocabulary: int) -> TokenMap:
        """Return the map between both vocabularies, cut to so many tokens.

        Raises:
            UnalignableError: they share nothing.
        """
        sides = (self.student, self.teachers)
        ends = [texts.end_in(side.template) for texts, side in zip(self._texts, sides, strict=True)]
        names = [side.tokenizer.name_or_path or type(side.tokenizer).__name__ for side in sides]
        return make_token_map(
            *self._texts, (vocabulary, other_vocabulary), ends=(ends[0], ends[1]), names=(names[0], names[1])
        )

    def _paired(self, ours: Outcome, theirs: Outcome) -> Outcome:
        if ours.problem is not None:
            return ours
        if theirs.problem is not None:
            problem = RowError(f"{theirs.problem} (in the teachers' tokenizer and template, data.teacher_template)")
            return replace(ours, encoded=None, problem=problem)
        cut = replace(ours, cut_other=theirs.cut_prompt or theirs.cut_response)
        if ours.encoded is None or theirs.encoded is None:
            return replace(cut, encoded=None)
        return replace(cut, encoded=self._aligned(ours, theirs, ours.encoded, theirs.encoded))

    def _aligned(self, ours: Outcome, theirs: Outcome, own: Encoded, other: Encoded) -> Encoded:
        spans = [[UNALIGNED] * len(row.input_ids) for row in (own, other)]
        count = 0
        for answers in zip(ours.answers, theirs.answers, strict=True):
            tokens = [
                texts.of(row.input_ids[start:stop])
                for texts, row, (start, stop) in zip(self._texts, (own, other), answers, strict=True)
            ]
            found = align(*from_first_letter(*tokens))
            # Nothing predicts position 0, so its label is not trained.
            untrained = {of[0] for of, (start, _) in zip(found, answers, strict=True) if not start and of}
            kept = {span: number for number, span in enumerate(sorted({*found[0]} - untrained - {UNALIGNED}), count)}
            for of, held, (start, stop) in zip(found, spans, answers, strict=True):
                held[start:stop] = [kept.get(span, UNALIGNED) for span in of]
            count += len(kept)
        return replace(own, spans=spans[0], other=replace(other, spans=spans[1]))
