"""Evaluation sets are read like training data: every format, turns, tools, and columns of other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from deltakd.data import InstructionData
from deltakd.evaluation.answers import make_set
from deltakd.evaluation.settings import EvaluationSettings, SetSource
from tests import tiny

CHAT = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% for call in m.tool_calls or () %}{{ call.function.name }}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "sum", "arguments": '{"of": [1, 2]}'}}
SHARED = [("human", "red?"), ("gpt", "cat"), ("human", "blue?"), ("gpt", "dog")]
RECORDS: dict[str, dict[str, Any]] = {
    "shared": {"system": "Be brief.", "conversations": [{"from": who, "value": text} for who, text in SHARED]},
    "tools": {
        "messages": [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
        "tools": [{"name": "sum"}],
    },
    "call": {
        "messages": [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    },
    "parts": {"prompt": [{"role": "user", "content": [{"type": "text", "text": "red?"}]}], "completion": "cat"},
    "own": {"ask": "red?", "said": "42"},
}
EXPECTED = {
    "shared": ("<system>Be brief.</s>\n<user>red?</s>\n<assistant>cat</s>\n<user>blue?</s>\n<assistant>", "dog"),
    "tools": ('[{"name": "sum"}]\n<user>1 + 2?</s>\n<assistant>sum</s>\n<tool>3</s>\n<assistant>', "It is 3."),
    "call": ("<user>1 + 2?</s>\n<assistant>", '{"name": "sum", "arguments": {"of": [1, 2]}}'),
    "parts": ("<user>red?</s>\n<assistant>", "cat"),
    "own": ("<user>red?</s>\n<assistant>", "42"),
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("name", RECORDS)
def test_prompts_and_references_of_a_set(name: str, ending: str, tmp_path: Path) -> None:
    path, record = tmp_path / f"{name}.{ending}", RECORDS[name]
    if ending == "jsonl":
        path.write_text(json.dumps(record) + "\n")
    elif ending == "parquet":
        pd.DataFrame([record]).to_parquet(path)
    else:
        cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in record.items()}
        pd.DataFrame([cells]).to_csv(path, index=False)
    data = InstructionData(
        train="x.jsonl", template="chat", max_prompt_length=200, columns={"instruction": "ask", "response": "said"}
    )
    rows = EvaluationSettings(sets={name: SetSource(source=str(path))}).rows_of(name, data)
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = CHAT.replace("</s>", str(tokenizer.eos_token))
    made = make_set(name, rows, data, tokenizer)
    prompt, reference = EXPECTED[name]
    assert made.prompts == [prompt.replace("</s>", str(tokenizer.eos_token))]
    assert made.references == [(reference,)]
