"""Templates, which render a row as text: format strings from the config, and the choice of a template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from string import Formatter
from typing import TYPE_CHECKING, Any, final

from deltakd.data.encoding.chat_template import ChatTemplate
from deltakd.data.encoding.segments import Segment, Template, conversation
from deltakd.data.sources.rows import Row, RowError, content_text, is_answer, message_images

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_NAMES = ("alpaca", "chat")


@final
@dataclass(frozen=True)
class PlainTemplate:
    """Fills the row into a format string; EOS closes each answer.

    Args:
        with_input: prompt for rows with an input; fields {instruction} and {input}.
        without_input: prompt for rows without one; field {instruction}.
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
        """Return alternating prompts and answers (several for a conversation); the first prompt gets BOS."""
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
        """Yield prompt, answer, and True if the answer is trained."""
        _refuse_tools(row)
        if row.messages is None:
            yield _own_prompt(row, self), (row.responses[0] if row.responses else None), True
            return
        asked: list[str] = []
        for message in conversation(row):
            if message["role"] != "assistant":
                asked.append(content_text(message))
                continue
            yield self.without_input.format(instruction="\n\n".join(asked)), content_text(message), is_answer(message)
            asked = []
        # Turns after the last answer form a prompt only if there is no answer to learn.
        if asked:
            yield self.without_input.format(instruction="\n\n".join(asked)), None, False


def _refuse_tools(row: Row) -> None:
    """Raise a RowError for anything that only a chat template can render."""
    held = ["tools"] if row.tools else []
    for number, message in enumerate(row.messages or ()):
        held += [f"{key} in messages[{number}]" for key in ("tool_calls", "reasoning_content") if message.get(key)]
        held += [f"the role tool in messages[{number}]"] if message["role"] == "tool" else []
        held += [f"an image in messages[{number}]"] if message_images(message) else []
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
        raise ValueError(f"template.{name} is not a format string: {error}; write a literal brace twice") from error
    if fields != needed:
        wanted = _in_braces(needed)
        found = ", ".join(f"{{{field}}}" for field in sorted(fields)) or "none"
        raise ValueError(f"template.{name} must have exactly the fields {wanted}; it has {found}")
    try:
        # Bad formats and conversions show up only when the text is filled in: {instruction:d}, {instruction!x}.
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


def make_template(name: str | Mapping[str, Any] | Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Make the template that a config asks for.

    Args:
        name: ``alpaca``, ``chat``, a mapping {with_input, without_input, tail}, or a template, returned as is.
        tokenizer: provides the chat template.

    Raises:
        ValueError: unknown name or keys, or the template rejects them.
    """
    if isinstance(name, Template):
        return name
    return plain_template(name) or ChatTemplate(tokenizer)


def plain_template(name: str | Mapping[str, Any]) -> PlainTemplate | None:
    """Return the template that a config asks for if it needs no tokenizer; None for ``chat``.

    Raises:
        ValueError: unknown name or keys, or texts that are not a template.
    """
    if name == "chat":
        return None
    if name == "alpaca":
        return AlpacaTemplate()
    if isinstance(name, Mapping):
        keys = {"with_input", "without_input", "tail"}
        if set(name) != keys:
            raise ValueError(f"template has the keys {sorted(name)}; it needs exactly {sorted(keys)}")
        return PlainTemplate(str(name["with_input"]), str(name["without_input"]), str(name["tail"]))
    allowed = ", ".join(TEMPLATE_NAMES)
    raise ValueError(f"unknown template {name!r}; allowed: {allowed}, or a mapping with_input, without_input, tail")
