"""Each family of chat templates is right, or refused by name; the documentation's table is this list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltakd.data import ChatTemplate
from deltakd.data.encoding.encode import Outcome, encode_batch, encode_prompt
from deltakd.data.encoding.examples import examples
from deltakd.data.sources.rows import Row, is_answer
from deltakd.types import IGNORE_INDEX
from tests.data.template_families import FAMILIES
from tests.data.template_family import ONE, REFUSED, SPLIT, Family
from tests.data.template_table import page

SYSTEM = {"role": "system", "content": "Be kind."}


def row(family: Family, *contents: str, **last: Any) -> Row:
    found = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    start = [SYSTEM] if family.system else []
    return Row(0, messages=(*start, *found[:-1], found[-1] | last))


def outcome(one: Row, tokenizer: Any) -> Outcome:
    [found] = encode_batch([one], ChatTemplate(tokenizer), tokenizer, 2000, 1500)
    return found


def by_library(family: Family, messages: list[dict[str, Any]], **options: Any) -> Any:
    """What the library itself makes of messages."""
    if family.parts:
        messages = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    return family.tokenizer().apply_chat_template(messages, return_dict=False, **options)


def check(family: Family, one: Row, answers: int) -> None:
    """The library's own rendering and its own tokens are the oracle."""
    tokenizer, messages = family.tokenizer(), list(one.messages or ())
    template, found = ChatTemplate(tokenizer), outcome(one, tokenizer)
    assert found.encoded is not None
    ids, labels = found.encoded.input_ids, found.encoded.labels
    text = "".join(segment.text for segment in template.render(one))
    prompt = encode_prompt(one, template, tokenizer, 1500)
    assert ids[: len(prompt)] == prompt
    merged = family.merges and any(turn["content"] == "Yes." and is_answer(turn) for turn in messages)
    assert found.kept_border == merged
    if not family.merges or len(messages) < 4:
        assert prompt == by_library(family, messages[:-1], add_generation_prompt=True)
    # The rest is the library's too, but for white space at its end, and for EOS where the template writes none.
    assert by_library(family, messages, tokenize=False).startswith(text) or family.reasoning != REFUSED
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert family.merges or ids in (whole, [*whole, tokenizer.eos_token_id])
    assert ids[-1] == tokenizer.eos_token_id
    trained = [n for n, label in enumerate(labels) if label != IGNORE_INDEX]
    assert trained[-1] == len(ids) - 1
    assert sum(n + 1 not in trained for n in trained) == answers


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family(family: Family) -> None:
    tokenizer = family.tokenizer()
    template = ChatTemplate(tokenizer)
    single = row(family, "Hi?", "Yes.")
    assert "".join(segment.text for segment in template.render(row(family, "Hi?"))) == family.prompt
    if "Yes." not in family.answer or "'Yes.'" in family.answer:
        assert family.answer in str(outcome(single, tokenizer).problem)
    else:
        assert [segment.text for segment in template.render(single)] == [family.prompt, family.answer]
        assert outcome(single, tokenizer).problem is None
        check(family, single, 1)
        rendered = by_library(family, list(single.messages or ()), tokenize=False)
        assert rendered.rstrip() == (family.prompt + family.answer).rstrip()
    reasoned = row(family, "Hi?", "Yes.", reasoning_content="Hm.")
    if family.reasoning == REFUSED:
        assert outcome(reasoned, tokenizer).problem is not None
    else:
        assert [segment.text for segment in template.render(reasoned)] == [family.prompt, family.reasoning]
        assert outcome(reasoned, tokenizer).problem is None
        check(family, reasoned, 1)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if "Yes." in f.answer and "'" not in f.answer], ids=lambda f: f.name
)
def test_conversations_of_a_family(family: Family) -> None:
    tokenizer = family.tokenizer()
    talk = row(family, "Hi?", "Yes.", "Why?", "So.")
    whole = outcome(talk, tokenizer)
    if family.turns == ONE:
        check(family, talk, 2)
    else:
        assert "data.split_turns=true" in str(whole.problem)
    parts = list(examples(talk, split_turns=True))
    assert [len(part.messages or ()) for part in parts] == [len(talk.messages or ()) - 2, len(talk.messages or ())]
    for part in parts:
        check(family, part, 1)


def test_there_are_forty_families_and_their_table_is_in_the_documentation() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) >= 40
    assert {family.turns for family in FAMILIES} == {ONE, SPLIT}
    written = Path(__file__).parents[2] / "docs" / "templates.md"
    assert written.read_text(encoding="utf-8") == page(), "run python -m tests.data.template_table"
