"""Writes docs/templates.md, the table of template families: ``python -m tests.data.template_table``."""

from __future__ import annotations

from pathlib import Path

from tests.data.template_families import FAMILIES
from tests.data.template_family import ONE, REFUSED, Family

_HEAD = """# Chat templates

<!-- Written by python -m tests.data.template_table; a test checks that it is up to date. -->

`data.template=chat` uses the chat template of the model's tokenizer. Each answer follows exactly the prompt that the
template writes for generation, and is trained with the end of its turn. The table shows what is trained of the answer
"Yes." in templates written in the manner of these families; a test tries each, with a small tokenizer of the family's
kind, and compares prompts and tokens with `tokenizer.apply_chat_template`. Where the answer ends without EOS, EOS
follows.

## Tokens

Prompt and answer are tokenised as one text, and a row's tokens begin with exactly the tokens of its prompt by itself,
which is what generation sees. An answer has no dummy prefix (SentencePiece) and begins no new word (WordPiece). Where
a tokenizer would merge the end of the prompt with the beginning of the answer, the border is kept: the answer's tokens
are those of a text that follows another one. The log counts such rows.

Control tokens in the data, such as `<|im_end|>` in a question, are text. Those that the template writes are control
tokens, and so are those in a `prompt` that is used verbatim. An EOS at the end of an answer counts as the one that
every answer gets. Other added tokens, such as `<think>`, are words that answers may use.

## Families

*Conversations*: `one row` trains all answers of a conversation in one row. `split_turns`: the template writes earlier
turns in another way once later ones follow, or without an end, so set `data.split_turns=true`, which makes an example
of each answer. *Reasoning*: what is trained of an answer with `reasoning_content` "Hm."; `refused`: the template leaves
it out, and the run stops with the row and a remedy.

| Family | Trained | Conversations | Reasoning |
| --- | --- | --- | --- |
"""


def _code(text: str) -> str:
    return "`" + text.replace("\n", "\\n").replace("|", "\\|") + "`"


def _line(family: Family) -> str:
    refused = "Yes." not in family.answer or "'Yes.'" in family.answer
    answer = f"refused: {family.answer.replace('|', '')}" if refused else _code(family.answer)
    turns = "" if refused and family.turns == ONE else family.turns
    reasoning = family.reasoning if family.reasoning == REFUSED else _code(family.reasoning)
    return f"| {family.name} | {answer} | {turns} | {reasoning} |\n"


def page() -> str:
    """The page, as Markdown."""
    return _HEAD + "".join(map(_line, FAMILIES))


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "templates.md"
    path.write_text(page(), encoding="utf-8")
