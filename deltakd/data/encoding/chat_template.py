"""The tokenizer's own chat template: it renders each prompt, and the answer that follows."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, final

from deltakd.data.encoding.image_reader import ImageError, reader_beside
from deltakd.data.encoding.segments import Segment, conversation, without_spaces
from deltakd.data.sources.rows import Message, Row, RowError, before_last_answer, content_text, is_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: Placeholder content, to find what the template writes after it; occurs in no template and no data.
_MARK = "deltakdquestionmark"
#: A call of a chat template to the clock, with its format written out.
_CLOCK = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")
#: The tag with which templates mark assistant turns, for masks of trained tokens.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: A key of a message -> the names under which templates read it.
_READ_AS = {
    "reasoning_content": ("reasoning_content", "reasoning", "thinking"),
    "tool_calls": ("tool_calls",),
    "tool_call_id": ("tool_call_id",),
    "name": ("name",),
}


class HistoryError(RowError):
    """The template renders earlier turns differently once later ones follow."""


class _Turn(NamedTuple):
    """An answer, and the prompt that generation would see."""

    prompt: str
    answer: str


@final
class ChatTemplate:
    """The tokenizer's own chat template; assistant turns are trained with their end-of-turn token.

    Each answer follows exactly the prompt that the template writes for generation. If the template marks the
    assistant's text (``{% generation %}``), exactly that is trained. Templates that expect content as a list of parts
    get one. A template that writes the date always gets the day on which the process first asked; that day is part of
    the ``repr``.

    Raises:
        ValueError: the tokenizer has no chat template, or its template reads the clock in a way that can't be frozen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat template; use "
                f"template=alpaca or the tokenizer of a chat model"
            )
        self._tokenizer = tokenizer
        self._text = _frozen(tokenizer.get_chat_template())
        # Some tokenizers have a separate template for conversations with tools.
        self._with_tools = _frozen(tokenizer.get_chat_template(tools=[{}]))

    def __repr__(self) -> str:
        other = "" if self._with_tools == self._text else f", tools={self._with_tools!r}"
        return f"ChatTemplate({self._text!r}{other})"

    def render(self, row: Row) -> list[Segment]:
        """Return alternating prompt and answer pieces, one pair per trained answer.

        Raises:
            HistoryError: the template renders an earlier answer differently once later turns follow, so one text
                can't hold them all as the model sees them.
            RowError: the template rejects the row, or does not write an answer after its prompt.
        """
        if row.prompt is not None:
            return _verbatim(row)
        messages = conversation(row)
        self._note_unread(row, messages)
        answers = [number for number, message in enumerate(messages) if is_answer(message)]
        if not answers:
            return self._with_images(row, [Segment(self._write(row, messages, prompt=True)[0], trained=False)])
        turns = [self._turn(row, messages, number) for number in answers]
        segments, done = [], ""
        for place, turn in enumerate(turns):
            if not turn.prompt.startswith(done):
                raise HistoryError(_rewritten(row, answers[place - 1]))
            answer = turn.answer
            if place + 1 < len(turns):
                answer = self._as_continued(row, messages[answers[place]], turn, turns[place + 1].prompt)
            segments.append(Segment(turn.prompt[len(done) :], trained=False))
            segments.append(Segment(answer, trained=True, closed=place + 1 == len(turns)))
            done = turn.prompt + answer
        return self._with_images(row, segments)

    def _with_images(self, row: Row, segments: list[Segment]) -> list[Segment]:
        """Return the pieces with as many image tokens in place of each one as its image has features.

        Raises:
            RowError: the template does not write one token for each image, or an image can't be read.
        """
        try:
            if not row.images:
                return segments
            reader = reader_beside(self._tokenizer)
            token = reader.token
            written = sum(segment.text.count(token) for segment in segments)
            if written != len(row.images):
                raise RowError(
                    f"{row.label} has {len(row.images)} images, and the chat template writes {token!r} {written} "
                    "times; use a chat template that writes it once for each image"
                )
            expansions = iter(reader.expansions(row.images))
        except ImageError as error:
            raise RowError(f"{row.label}: {error}") from None
        return [
            replace(segment, text=re.sub(re.escape(token), lambda _: next(expansions), segment.text))
            for segment in segments
        ]

    def tail(self, row: Row) -> str:
        """Return what the template writes between the last turn and the answer; "" if not found."""
        if row.prompt is not None:
            return ""
        messages = list(before_last_answer(conversation(row)))
        # Searching for the question itself would fail: "start" also occurs in "<|im_start|>".
        marked = [*messages[:-1], messages[-1] | {"content": _MARK}]
        _, found, tail = self._write(row, marked, prompt=True)[0].rpartition(_MARK)
        return tail if found else ""

    def keeps_end(self, row: Row) -> bool:
        """Return True: the last question is right before the tail."""
        return True

    def _turn(self, row: Row, messages: list[Message], number: int) -> _Turn:
        """Return the prompt of an answer, and the answer as the template ends it when nothing follows."""
        prompt, _ = self._write(row, messages[:number], prompt=True)
        whole, spans = self._write(row, messages[: number + 1], prompt=False)
        if not whole.startswith(prompt):
            return _Turn(prompt, self._after_thinking(row, messages, number, prompt))
        # White space after the end-of-turn token belongs to the next prompt: generation stops before it.
        answer = whole[len(prompt) :].rstrip()
        if spans is not None:
            _check_spans(row, number, spans, len(prompt), whole)
        return _Turn(prompt, answer)

    def _as_continued(self, row: Row, message: Message, turn: _Turn, following: str) -> str:
        """Return the answer as written before a later turn; some templates end the last answer differently (Phi-3)."""
        if following.startswith(turn.prompt + turn.answer):
            return turn.answer
        common = _common(turn.prompt + turn.answer, following)
        ends = [match.end() for match in self._added.finditer(common, min(len(turn.prompt), len(common)))]
        answer = common[len(turn.prompt) : ends[-1]] if ends else ""
        if not without_spaces(answer) or without_spaces(content_text(message)) not in without_spaces(answer):
            raise HistoryError(_rewritten(row, (row.messages or ()).index(message)))
        return answer

    def _after_thinking(self, row: Row, messages: list[Message], number: int, prompt: str) -> str:
        """Return the answer to a prompt that opens a reasoning block which the template drops from the conversation.

        DeepSeek-R1's prompt ends with ``<think>``, and its template drops everything in an answer before
        ``</think>``. The model itself writes its reasoning, the end of the block, and the answer with its usual end.
        """
        message = messages[number]
        if not prompt.rstrip().endswith("<think>"):
            raise RowError(
                f"{row.label}: what the chat template writes for turn {number} does not begin with the prompt that it "
                f"writes for generation, which ends with {prompt[-40:]!r}, so the model would be trained on something "
                "else than it is asked; use another template"
            )
        content, reasoning = content_text(message), message.get("reasoning_content")
        if reasoning is None:
            opened, found, content = content.partition("</think>")
            reasoning = opened.strip().removeprefix("<think>")
            if not found:
                raise RowError(
                    f"{row.label}: the chat template's prompt opens <think>, and turn {number} holds no reasoning; "
                    "give it as reasoning_content, or as <think>...</think> before the answer"
                )
        plain = {key: held for key, held in message.items() if key in ("role", "weight")} | {"content": _MARK}
        marked, _ = self._write(row, [*messages[:number], plain], prompt=False)
        _, found, end = marked.rpartition(_MARK)
        if not found:
            raise RowError(f"{row.label}: the chat template leaves out the content of turn {number}")
        gap = "" if prompt[-1:].isspace() else "\n"
        return f"{gap}{reasoning.strip()}\n</think>\n\n{content.strip()}{end.rstrip()}"

    def _write(self, row: Row, messages: list[Message], prompt: bool) -> tuple[str, list[tuple[int, int]] | None]:
        """Render messages. Also return where the assistant's parts are, if the template marks them."""
        template = self._with_tools if row.tools else self._text
        spans = _GENERATION.search(template) is not None and not prompt
        form = _as_parts if self._reads_parts or row.images else _as_text
        try:
            return self._render(template, [form(message) for message in messages], row.tools, prompt, spans)
        # The template's own code may raise anything on data that it does not expect.
        except _template_errors() as error:
            raise RowError(_refused(row, messages, error)) from error

    def _render(
        self, template: str, messages: list[dict[str, Any]], tools: Sequence[Any] | None, prompt: bool, spans: bool
    ) -> tuple[str, list[tuple[int, int]] | None]:
        from transformers.utils.chat_template_utils import render_jinja_template

        special: dict[str, Any] = dict(self._tokenizer.special_tokens_map)
        # The library's annotation leaves out the second part.
        rendered: Any = render_jinja_template(
            [messages],
            tools=list(tools) if tools else None,
            chat_template=template,
            return_assistant_tokens_mask=spans,
            add_generation_prompt=prompt,
            **special,
        )
        texts, found = rendered
        return texts[0], list(found[0]) if spans else None

    @cached_property
    def _reads_parts(self) -> bool:
        """Return True if the template reads content only as a list of parts, as image models' templates do."""
        for form in (_as_text, _as_parts):
            message = form({"role": "user", "content": _MARK})
            try:
                text, _ = self._render(self._text, [message], None, prompt=True, spans=False)
            except _template_errors():
                continue
            # A template that expects text may print a list as Python or JSON does.
            if _MARK in text and "'text'" not in text and '"text"' not in text:
                return form is _as_parts
        return False

    @cached_property
    def _added(self) -> re.Pattern[str]:
        """Matches the tokenizer's added tokens, the longest first."""
        names = sorted((token.content for token in self._tokenizer.added_tokens_decoder.values()), key=len)
        return re.compile("|".join(map(re.escape, reversed(names))) or "(?!)")

    def _note_unread(self, row: Row, messages: list[Message]) -> None:
        """Warn, once per key, of keys in this row that the template does not read."""
        template = self._with_tools if row.tools else self._text
        held = {key for message in messages for key in message if key in _READ_AS}
        for key in sorted(held):
            if not any(name in template for name in _READ_AS[key]):
                without = [{k: v for k, v in message.items() if k != key} for message in messages]
                if self._write(row, without, prompt=False) == self._write(row, messages, prompt=False):
                    _warn_unread(key)
        if row.tools and "tools" not in template:
            _warn_unread("tools")


@cache
def _warn_unread(key: str) -> None:
    log.warning("the chat template does not read %s, which rows of the data hold; it is left out", key)


@cache
def _template_errors() -> tuple[type[Exception], ...]:
    from jinja2 import TemplateError

    return TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError


def _as_text(message: Message) -> dict[str, Any]:
    """Return the message as most templates read it: content as one text, without its weight."""
    return {key: held for key, held in message.items() if key != "weight"} | {"content": content_text(message)}


def _as_parts(message: Message) -> dict[str, Any]:
    """Return the message as image models' templates read it: content as a list of parts."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return _as_text(message) | {"content": parts}


def _check_spans(row: Row, number: int, spans: list[tuple[int, int]], prompt: int, whole: str) -> None:
    """Raise a RowError unless the template marks everything after the prompt in the turn as the assistant's."""
    own = [(max(start, prompt), stop) for start, stop in spans if stop > prompt]
    if not own:
        raise RowError(f"{row.label}: the chat template's generation block leaves out turn {number}; use another one")
    for part in (whole[prompt : own[0][0]], whole[own[-1][1] :]):
        if part.strip():
            raise RowError(
                f"{row.label}: the chat template's generation block leaves out {part.strip()[:60]!r} of turn {number}, "
                "which the model must write after its prompt; put all of the turn that follows the generation prompt "
                "into the block, its end included, or take the block out of the template"
            )


@cache
def _today() -> date:
    """Return the day on which the process first asked: a run past midnight keeps its date."""
    return date.today()


def _frozen(template: str) -> str:
    """Return the template with the date in place of its calls to the clock.

    Raises:
        ValueError: a call whose format is not written out.
    """
    text = _CLOCK.sub(lambda call: repr(_today().strftime(call[1] or call[2] or "")), template)
    if re.search(r"strftime_now\s*\(", text):
        raise ValueError(
            "the chat template reads the clock (strftime_now) with a format that is not written out, so its date can't "
            "be kept the same for the whole run; write the date into the template"
        )
    return text


def _refused(row: Row, messages: list[Message], error: Exception) -> str:
    roles = ", ".join(message["role"] for message in messages)
    return (
        f"{row.label}: the chat template rejects the turns {roles}: {error}; let user and assistant alternate, write "
        f"the system prompt into the first user turn, or use another template, such as data.template=alpaca"
    )


def _verbatim(row: Row) -> list[Segment]:
    segments = [Segment(row.prompt or "", trained=False, special_tokens=True)]
    answers = [Segment(text, trained=True, closed=True) for text in row.responses[:1]]
    return segments + answers


def _rewritten(row: Row, number: int) -> str:
    return (
        f"{row.label}: the chat template writes turn {number} in another way once later turns follow (without its "
        f"reasoning or its end, for instance), so one row can't train all its answers as the model would see them; set "
        f"data.split_turns=true, which makes a row of each answer, or use single-turn data"
    )


def _common(a: str, b: str) -> str:
    return a[: next((n for n, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), len(a))][: len(b)]
