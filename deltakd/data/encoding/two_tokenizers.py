"""Rows in two tokenizers: the student's, and the teachers' with a template of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, final

from deltakd.data.encoding.align import align, from_first_letter
from deltakd.data.encoding.answer_frame import AnswerFrame, written_text
from deltakd.data.encoding.control_tokens import without_private
from deltakd.data.encoding.encode import Outcome, encode_batch, encode_prompts
from deltakd.data.encoding.encoded_set import Encoded
from deltakd.data.encoding.segments import Template
from deltakd.data.encoding.token_cache import tokenizer_fingerprint
from deltakd.data.encoding.token_map import make_token_map
from deltakd.data.encoding.token_texts import END, TokenTexts
from deltakd.data.encoding.tokens import TextEncoder
from deltakd.data.sources.rows import Row, RowError
from deltakd.types import IGNORE_INDEX, UNALIGNED, TokenMap

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

    def prompts(self, rows: Sequence[Row]) -> tuple[list[list[int]], int]:
        """Tokenise prompts alone; see ``encode_prompts``."""
        return encode_prompts(rows, self.template, self.tokenizer, self.max_prompt_length)

    @property
    def identity(self) -> list[object]:
        """Everything that the tokens of a row depend on."""
        limits = [self.max_length, self.max_prompt_length, self.overlong]
        return [tokenizer_fingerprint(self.tokenizer), repr(self.template), limits]


class WrittenAnswer(NamedTuple):
    """An answer that the student wrote.

    Args:
        row: in both tokenizers, aligned.
        is_utf8: False if its bytes are no text.
    """

    row: Encoded
    is_utf8: bool


@dataclass(frozen=True)
class _Answer:
    """An answer within a row: the place of its first token, and the texts of its tokens (``TokenTexts.of``)."""

    start: int
    texts: list[str]


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

    def answered(
        self, row_id: int, prompts: tuple[Sequence[int], Sequence[int]], response: Sequence[int], finished: bool
    ) -> WrittenAnswer:
        """Return the row of an answer that the student wrote, in both tokenizers.

        The teachers read the text of the student's tokens in their own template, and its end where it ended. Control
        tokens within it have no text.

        Args:
            row_id: of the prompt.
            prompts: the prompt's tokens, of the student and of the teachers.
            response: the student's tokens.
            finished: True if the last one ended the answer.
        """
        texts = self._texts[0].of(response)
        texts = [*texts[:-1], END] if finished else texts
        plain = "".join(text for text in texts if text not in (END, _OURS)).encode("latin-1")
        text, is_utf8 = written_text(plain, finished)
        before, after = self._own_blanks
        text = text.removeprefix(before).removesuffix(after if finished else "")
        theirs = self._teachers_tokens(text, finished)[: max(0, self.teachers.max_length - len(prompts[1]))]
        own, other = (
            Encoded([*prompt, *ids], [IGNORE_INDEX] * len(prompt) + [*ids], row_id)
            for prompt, ids in zip(prompts, (response, theirs), strict=True)
        )
        answers = (_Answer(len(prompts[0]), texts), _Answer(len(prompts[1]), self._texts[1].of(theirs)))
        return WrittenAnswer(_with_spans(own, other, [answers]), is_utf8)

    def _teachers_tokens(self, text: str, finished: bool) -> list[int]:
        """Return an answer's tokens as the teachers' template writes it after the prompt."""
        encoder = self._encoders[1]
        frame = self._frames[1]
        try:
            text, guarded = encoder.control.guarded_text(text)
        except RowError:
            text, guarded = encoder.control.guarded_text(without_private(text))
        written = frame.before + text + (frame.after if finished else "")
        ids = encoder.following(written, guarded)
        # A text that merges with whatever stands before it is rare; it then begins as a text of its own.
        ids = encoder.one(written, guarded=guarded) if ids is None else ids
        return [*ids, encoder.end] if finished and frame.closed and ids[-1:] != [encoder.end] else ids

    @cached_property
    def _encoders(self) -> tuple[TextEncoder, TextEncoder]:
        return TextEncoder(self.student.tokenizer), TextEncoder(self.teachers.tokenizer)

    @cached_property
    def _frames(self) -> tuple[AnswerFrame, AnswerFrame]:
        return AnswerFrame.of(self.student.template), AnswerFrame.of(self.teachers.template)

    @cached_property
    def _own_blanks(self) -> tuple[str, str]:
        """What the student's template writes before an answer, and between the answer and its end."""
        frame, encoder = self._frames[0], self._encoders[0]
        after = "".join(self._texts[0].of(encoder.following(frame.after) or ()))
        return frame.before, after.partition(END)[0]

    def _paired(self, ours: Outcome, theirs: Outcome) -> Outcome:
        if ours.problem is not None:
            return ours
        if theirs.problem is not None:
            problem = RowError(f"{theirs.problem} (in the teachers' tokenizer and template, data.teacher_template)")
            return replace(ours, encoded=None, problem=problem)
        cut = replace(ours, cut_other=theirs.cut_prompt or theirs.cut_response)
        if ours.encoded is None or theirs.encoded is None:
            return replace(cut, encoded=None)
        sides = zip((ours, theirs), (ours.encoded, theirs.encoded), self._texts, strict=True)
        answers = [
            [_Answer(start, texts.of(row.input_ids[start:stop])) for start, stop in outcome.answers]
            for outcome, row, texts in sides
        ]
        return replace(cut, encoded=_with_spans(ours.encoded, theirs.encoded, zip(*answers, strict=True)))


def _with_spans(own: Encoded, other: Encoded, answers: Iterable[tuple[_Answer, _Answer]]) -> Encoded:
    """Return the student's row with the teachers' row, and with the spans of their answers in both."""
    spans = [[UNALIGNED] * len(row.input_ids) for row in (own, other)]
    count = 0
    for pair in answers:
        found = align(*from_first_letter(pair[0].texts, pair[1].texts))
        # Nothing predicts position 0, so its label is not trained.
        untrained = {of[0] for of, answer in zip(found, pair, strict=True) if not answer.start and of}
        kept = {span: number for number, span in enumerate(sorted({*found[0]} - untrained - {UNALIGNED}), count)}
        for of, held, answer in zip(found, spans, pair, strict=True):
            held[answer.start : answer.start + len(of)] = [kept.get(span, UNALIGNED) for span in of]
        count += len(kept)
    return replace(own, spans=spans[0], other=replace(other, spans=spans[1]))
