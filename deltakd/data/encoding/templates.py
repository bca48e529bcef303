"""Templates render a row as text: the pieces that the model reads, and those it learns to write."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from string import Formatter
from typing import TYPE_CHECKING, Any, Protocol, final, runtime_checkable

from deltakd.data.sources.rows import Message, Row, RowError, before_last_answer, content_text, is_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_NAMES = ("alpaca", "chat")

#: Stands in for the last question, to find what the template writes after it; in no template and no question.
_MARK = "deltakdquestionmark"
#: A call of a chat template to the clock, with its format written out.
_CLOCK = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")


@dataclass(frozen=True)
class Segment:
    """A piece of text that is tokenised on its own.

    Args:
        text: the piece.
        trained: True if the model learns to write it.
        special_tokens: let the tokenizer add its special tokens (BOS), unless the text already starts with BOS.
        closed: append EOS, trained like the piece, unless the text already ends with it.
    """

    text: str
    trained: bool
    special_tokens: bool = False
    closed: bool = False


@runtime_checkable
class Template(Protocol):
    """Renders rows. Its ``repr`` is part of the key of cached tokens, so it must include everything that matters."""

    def render(self, row: Row) -> list[Segment]:
        """Return prompt and answer pieces in turn; just the prompt if the row has no answer."""
        ...

    def tail(self, row: Row) -> str:
        """Return the end of the prompt, which must survive when a prompt is cut; "" if it is not known."""
        ...

    def keeps_end(self, row: Row) -> bool:
        """True if a prompt that is too long loses its beginning, False if it loses what is before its tail."""
        ...


@final
@dataclass(frozen=True)
class PlainTemplate:
    """Fills the row into a format string; EOS closes each answer.

    Args:
        with_input: the prompt of rows with an input; fields {instruction} and {input}.
        without_input: the prompt of the others; field {instruction}.
        tail_text: the end of both, which survives when a prompt is cut.

    Raises:
        ValueError: a field is missing or unknown, or a text does not end with the tail.
    """

    with_input: str
    without_input: str
    tail_text: str

    def __post_init__(self) -> None:
        _check_fields("with_input", self.with_input, {"instruction", "input"})
        _check_fields("without_input", self.without_input, {"instruction"})
        for name in ("with_input", "without_input"):
            if not getattr(self, name).endswith(self.tail_text):
                raise ValueError(f"template.{name} must end with template.tail = {self.tail_text!r}")

    def render(self, row: Row) -> list[Segment]:
        """Return prompt and answer in turn (several times for a conversation); the first prompt gets BOS."""
        segments: list[Segment] = []
        for prompt, response, trained in self._turns(row):
            segments.append(Segment(prompt, trained=False, special_tokens=not segments))
            if response is not None:
                segments.append(Segment(response, trained=trained, closed=True))
        return segments

    def tail(self, row: Row) -> str:
        """Return the tail, the same for every row."""
        return self.tail_text

    def keeps_end(self, row: Row) -> bool:
        """True for a conversation, whose last question is at its end; an instruction comes before its input."""
        return row.messages is not None

    def _turns(self, row: Row) -> Iterator[tuple[str, str | None, bool]]:
        """Yield prompt, answer, and whether the answer is trained."""
        _refuse_tools(row)
        if row.messages is None:
            yield _own_prompt(row, self), (row.responses[0] if row.responses else None), True
            return
        asked: list[str] = []
        for message in _conversation(row):
            if message["role"] != "assistant":
                asked.append(content_text(message))
                continue
            yield self.without_input.format(instruction="\n\n".join(asked)), content_text(message), is_answer(message)
            asked = []
        # What is asked after the last answer is a prompt only if there is no answer to learn.
        if asked:
            yield self.without_input.format(instruction="\n\n".join(asked)), None, False


def _refuse_tools(row: Row) -> None:
    """Raise a RowError for what only a chat template can write."""
    held = ["tools"] if row.tools else []
    for number, message in enumerate(row.messages or ()):
        held += [f"{key} in messages[{number}]" for key in ("tool_calls", "reasoning_content") if message.get(key)]
        held += [f"the role tool in messages[{number}]"] if message["role"] == "tool" else []
    if held:
        raise RowError(
            f"{row.label} has {held[0]}, which a plain template can't write; use data.template=chat with the tokenizer "
            f"of a model that knows it, or take it out of the data"
        )


def _own_prompt(row: Row, template: PlainTemplate) -> str:
    if row.prompt is not None:
        return row.prompt
    if row.input.strip():
        return template.with_input.format(instruction=row.instruction, input=row.input)
    return template.without_input.format(instruction=row.instruction)


def _in_braces(fields: set[str]) -> str:
    return " and ".join(f"{{{field}}}" for field in sorted(fields, reverse=True))


def _check_fields(name: str, text: str, needed: set[str]) -> None:
    try:
        fields = {field for _, field, _, _ in Formatter().parse(text) if field is not None}
    except ValueError as error:
        raise ValueError(f"template.{name} is no format text: {error}; write a literal brace twice") from error
    if fields != needed:
        wanted = _in_braces(needed)
        found = ", ".join(f"{{{field}}}" for field in sorted(fields)) or "none"
        raise ValueError(f"template.{name} must have exactly the fields {wanted}; it has {found}")
    try:
        # Formats and conversions show when a text is filled in: {instruction:d}, {instruction!x}.
        text.format(**dict.fromkeys(needed, "text"))
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"template.{name} can't be filled in: {error}; write its fields as {_in_braces(needed)}"
        ) from error


_ALPACA_ASK = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}"
_ALPACA_TAIL = "\n\n### Response:\n"

#: Stanford Alpaca's prompt, as in MiniLLM's evaluation sets (arXiv 2306.08543).
AlpacaTemplate = partial(
    PlainTemplate,
    with_input="Below is an instruction that describes a task, paired with an input that provides further context. "
    + _ALPACA_ASK
    + "\n\n### Input:\n{input}"
    + _ALPACA_TAIL,
    without_input="Below is an instruction that describes a task. " + _ALPACA_ASK + _ALPACA_TAIL,
    tail_text=_ALPACA_TAIL,
)


@final
class ChatTemplate:
    """The tokenizer's own chat template; assistant turns are trained with their end-of-turn token.

    A template that writes the date always gets the day on which the process first asked; it is part of the ``repr``.

    Raises:
        ValueError: the tokenizer has no chat template, or one that reads the clock in a way that can't be frozen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat template; use "
                f"template=alpaca or the tokenizer of a chat model"
            )
        self._tokenizer = tokenizer
        self._text = _frozen(tokenizer.get_chat_template())

    def __repr__(self) -> str:
        return f"ChatTemplate({self._text!r})"

    def render(self, row: Row) -> list[Segment]:
        """Return prompt and answer pieces in turn, found by rendering ever longer prefixes of the conversation.

        Raises:
            RowError: the template refuses the row, or a longer prefix does not start with the shorter one, so the
                pieces cannot be told apart.
        """
        if row.prompt is not None:
            return _verbatim(row)
        messages = _conversation(row)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not any(map(is_answer, messages)):
            return [Segment(self._write(row, messages, prompt=True), trained=False)]
        segments, done = [], ""
        for number in answers:
            prompt = self._write(row, messages[:number], prompt=True)
            whole = self._write(row, messages[: number + 1], prompt=False)
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise RowError(_not_a_prefix(row, number))
            # White space after the end-of-turn token belongs to the next prompt: generation stops before it.
            answer = whole[len(prompt) :].rstrip()
            segments.append(Segment(prompt[len(done) :], trained=False))
            trained = is_answer(messages[number])
            segments.append(Segment(answer, trained=trained, closed=number == answers[-1]))
            done = prompt + answer
        return segments

    def tail(self, row: Row) -> str:
        """Return what the template writes between the last turn and the answer; "" if not found."""
        if row.prompt is not None:
            return ""
        messages = list(before_last_answer(_conversation(row)))
        # The question itself can't be looked for: "start" stands in "<|im_start|>", too.
        marked = [*messages[:-1], messages[-1] | {"content": _MARK}]
        _, found, tail = self._write(row, marked, prompt=True).rpartition(_MARK)
        return tail if found else ""

    def keeps_end(self, row: Row) -> bool:
        """True: the last question is right before the tail."""
        return True

    def _write(self, row: Row, messages: list[Message], prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=list(row.tools or ()) or None,
                chat_template=self._text,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (TemplateError, TypeError) as error:
            raise RowError(_refused(row, messages, error)) from error
        assert isinstance(text, str)
        return text


@cache
def _today() -> date:
    """The day on which the process first asked: a run past midnight keeps its date."""
    return date.today()


def _frozen(template: str) -> str:
    """The template with the date in place of its calls to the clock.

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
        f"{row.label}: the chat template refuses the turns {roles}: {error}; let user and assistant alternate, write "
        f"the system prompt into the first user turn, or use another template, such as data.template=alpaca"
    )


def _verbatim(row: Row) -> list[Segment]:
    segments = [Segment(row.prompt or "", trained=False, special_tokens=True)]
    answers = [Segment(text, trained=True, closed=True) for text in row.responses[:1]]
    return segments + answers


def _conversation(row: Row) -> list[Message]:
    """Return the row as messages, without the turns after the last answer: there is nothing to learn from them."""
    if row.messages is not None:
        messages = list(row.messages)
        asked = before_last_answer(messages)
        return messages[: len(asked) + 1]
    question = "\n\n".join(part for part in (row.instruction, row.input) if part.strip())
    answer = [{"role": "assistant", "content": text} for text in row.responses[:1]]
    return [{"role": "user", "content": question}, *answer]


def _not_a_prefix(row: Row, number: int) -> str:
    return (
        f"{row.label}: the chat template rewrites earlier turns when turn {number} is added, so the tokens to train "
        f"on cannot be found; use single-turn data or another template"
    )


def make_template(name: str | Mapping[str, Any] | Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Make the template that a config asks for.

    Args:
        name: ``alpaca``, ``chat``, a mapping {with_input, without_input, tail}, or a template, returned as is.
        tokenizer: provides the chat template.

    Raises:
        ValueError: unknown name or keys, or the template rejects them.
    """
    if name == "alpaca":
        return AlpacaTemplate()
    if name == "chat":
        return ChatTemplate(tokenizer)
    if isinstance(name, Mapping):
        keys = {"with_input", "without_input", "tail"}
        if set(name) != keys:
            raise ValueError(f"template has the keys {sorted(name)}; it needs exactly {sorted(keys)}")
        return PlainTemplate(str(name["with_input"]), str(name["without_input"]), str(name["tail"]))
    if isinstance(name, Template):
        return name
    allowed = ", ".join(TEMPLATE_NAMES)
    raise ValueError(f"unknown template {name!r}; allowed: {allowed}, or a mapping with_input, without_input, tail")
