"""Files of every format, folders and globs of them, and columns of other names."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from deltakd.data import InstructionData, Row, read_rows, read_texts
from deltakd.data.sources.records import Problems, missing_sources

Write = Callable[[str, Any], str]

ROWS = [
    {"instruction": "a,b", "input": "", "output": "42"},
    {"instruction": "one\n\ntwo", "input": "c", "output": 'NaN, or "None"'},
]
READ = [Row(0, "a,b", "", ("42",)), Row(1, "one\n\ntwo", "c", ('NaN, or "None"',))]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def written(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    """The rows in the format that the path's name ends in."""
    kind = path.name.partition(".")[2]
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if kind.startswith(("csv", "tsv")):
            table = pd.DataFrame(rows)
            text = table.to_csv(index=False, sep="\t" if kind.startswith("tsv") else ",", lineterminator="\r\n")
        elif kind.startswith("json") and not kind.startswith("jsonl"):
            text = json.dumps(rows)
        compression = {"gz": "gzip", "zst": "zstd"}.get(kind.rpartition(".")[2])
        with pa.output_stream(str(path), compression=compression) as stream:
            stream.write(text.encode())
    return str(path)


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.csv.zst", "a.tsv",
     "a.tsv.gz", "a.parquet", "a.arrow"],
)  # fmt: skip
def test_every_format_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    assert read_rows(written(tmp_path / name)) == READ


def test_json_may_be_lines_or_have_its_records_under_data(write: Write) -> None:
    assert read_rows(write("a.json", json.dumps({"version": 1, "data": ROWS}))) == READ
    assert read_rows(write("b.json", "\n".join(map(json.dumps, ROWS)))) == READ
    with pytest.raises(ValueError, match=r"c.json: expected a JSON list .* under 'data'; .* keys rows, version"):
        read_rows(write("c.json", json.dumps({"rows": ROWS, "version": 1})))
    with pytest.raises(ValueError, match=r"d.json:2: not JSON: Expecting"):
        read_rows(write("d.json", '[{"a": 1},\n{]'))


def test_csv_with_semicolons_and_a_byte_order_mark(write: Write) -> None:
    text = '\ufeff\n question ;answer\n\nWhat is 7 + 5?;12\n\n,;"a;b"\n'
    assert read_rows(write("a.csv", text)) == [Row(0, "What is 7 + 5?", "", ("12",)), Row(1, ",", "", ("a;b",))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'question,answer\n"a\nb",c\nd\ne,f,g\n',
            r"a.csv: 2 bad .*a.csv:4: 1 cells, .*commas.* header has 2 \(q.*:5: 3",
        ),
        ("question,answer\na,\n", r"a.csv:2: response is empty; keys found: answer, question"),
        ("question,question\na,b\n", r"a.csv:1: the header has the column 'question' twice"),
        ('question,answer\na,b\n"c,d\n', r"a.csv:3: not readable as CSV: unexpected end"),
        ("question,answer\n", r"a.csv is empty"),
        ("a;b\n1;2\n", r"a.csv:2: no instruction; keys found: a, b"),
    ],
)
def test_bad_csv_is_named_with_its_line(write: Write, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_rows(write("a.csv", text))


def test_messages_stand_in_a_cell_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["messages", "tools"], [json.dumps(TALK), '[{"name": "f"}]']])
    assert read_rows(str(path)) == [Row(0, messages=tuple(TALK), tools=({"name": "f"},))]


def test_gaps_of_typed_tables_are_no_values(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": "z"}}}
    talks = [
        [
            TALK[0],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            TALK[1],
        ],
        [
            TALK[0],
            {"role": "assistant", "content": "", "tool_calls": [other]},
            {"role": "tool", "content": "2"},
            TALK[1],
        ],
    ]
    rows = read_rows(written(tmp_path / "a.parquet", [{"messages": talk} for talk in talks]))
    for row, talk in zip(rows, talks, strict=True):
        assert row.messages == (talk[0], talk[1] | {"content": ""}, *talk[2:])
    frame = pd.DataFrame({"instruction": ["a"], "output": ["b"], "input": [np.nan]})
    frame.to_parquet(tmp_path / "b.parquet")
    assert read_rows(str(tmp_path / "b.parquet")) == [Row(0, "a", "", ("b",))]


def test_a_number_in_a_typed_column_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", [{"question": "a", "answer": 42}])
    with pytest.raises(ValueError, match=r"a.parquet\[0\]: answer must be a string or a list of strings, got int"):
        read_rows(path)


def test_files_that_are_not_what_their_names_say(write: Write, tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow", "a.jsonl.zst"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            read_rows(write(name, "{}\n" * 9))
    path = tmp_path / "a.csv"
    path.write_bytes("question,answer\nä,ö\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"a.csv: near line 1 is text that is not UTF-8 .*save it as UTF-8"):
        read_rows(str(path))


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(".parquet", "it is Parquet; rename it to .parquet"), (".arrow", "it is Arrow; rename it to .arrow")],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_a_table_under_the_name_of_a_text_is_recognised(name: str, suffix: str, kind: str, tmp_path: Path) -> None:
    # Bytes that are no UTF-8 must follow the head, as they do in tables of real size.
    table = written(tmp_path / f"right{suffix}", [{"question": f"é {n} " * 9, "answer": str(n)} for n in range(999)])
    (tmp_path / name).write_bytes(Path(table).read_bytes())
    with pytest.raises(ValueError, match=f"cannot read .*{name}: {kind}"):
        read_rows(str(tmp_path / name))


def test_a_compressed_file_and_utf_16_are_recognised(tmp_path: Path) -> None:
    text = '{"question": "é", "answer": "b"}\n'
    contents = {"add .gz": gzip.compress(text.encode()), "it is UTF-16": text.encode("utf-16")}
    for what, content in contents.items():
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=what):
            read_rows(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode("utf-16")))
    with pytest.raises(ValueError, match="it is UTF-16; save it as UTF-8"):
        read_rows(str(tmp_path / "a.jsonl.gz"))


def test_a_folder_and_a_glob_are_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(["b.jsonl", "a.jsonl", "deep/c.jsonl.gz", "deep/er/d.jsonl"]):
        written(tmp_path / name, [{"instruction": f"i{number}", "output": "x"}] * 2)
    for name in ("_SUCCESS", ".hidden.jsonl", "README.md", "dataset_infos.json"):
        (tmp_path / name).write_text("no data")
    rows = read_rows(str(tmp_path))
    assert [(row.id, row.instruction) for row in rows[::2]] == [(0, "i1"), (2, "i0"), (4, "i2"), (6, "i3")]
    assert rows[5].where == f"{tmp_path}/deep/c.jsonl.gz:2"
    assert [row.instruction for row in read_rows(f"{tmp_path}/*.jsonl")] == ["i1", "i1", "i0", "i0"]
    assert len(read_rows(f"{tmp_path}/**/*.jsonl#instruction=i3")) == 2
    assert missing_sources({"data.train": [str(tmp_path), f"{tmp_path}/*.jsonl"]}) == []
    (wrong,) = missing_sources({"data.train": f"{tmp_path}/*.csv"})
    assert wrong.startswith(f"data.train: {tmp_path}/*.csv matches no file that can be read (.jsonl, .json, .csv")


def test_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one\n<|endoftext|>\ntwo\n")
    with gzip.open(tmp_path / "a.txt.gz", "wt") as stream:
        stream.write("zero")
    assert read_texts(str(tmp_path)) == ["zero", "one", "two"]
    assert read_texts(f"{tmp_path}/b.*") == ["one", "two"]


def test_a_folder_of_several_kinds_or_splits_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "train-00000-of-00001.parquet")
    written(tmp_path / "validation-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"several splits \(train, validation\); name the folder .* or a glob"):
        read_rows(str(tmp_path))
    assert read_rows(f"{tmp_path}/train-*") == READ
    written(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"files of several kinds \(.csv, .parquet\)"):
        read_rows(str(tmp_path))
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no file that can be read"):
        read_rows(str(empty))


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    assert read_rows(str(tmp_path / "one")) == READ
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
    assert read_rows(str(tmp_path / "two" / "test")) == READ
    with pytest.raises(ValueError, match=r"several splits \(test, train\)"):
        read_rows(str(tmp_path / "two"))


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{"input": "a", "ask": "x", "said": "b", "kind": "k"}, {"input": "c", "said": "d", "kind": "l"}]
    path, columns = written(tmp_path / "a.jsonl", rows), {"instruction": "input", "input": "ask", "response": "said"}
    assert read_rows(path, columns=columns) == [Row(0, "a", "x", ("b",)), Row(1, "c", "", ("d",))]
    assert len(read_rows(f"{path}#said=d", columns=columns | {"category": "kind"})) == 1
    assert len(read_rows(f"{path}#kind=l", columns=columns | {"category": "kind"})) == 1
    assert read_texts(path, columns={"text": "said"}) == ["b", "d"]
    with pytest.raises(
        ValueError, match=r"has {response: sad}, but no record of .*a.jsonl has it; .*: input, ask, said"
    ):
        read_rows(path, columns=columns | {"response": "sad"})


def test_columns_count_in_other_sources_where_they_fit(tmp_path: Path) -> None:
    columns = {"instruction": "input", "response": "said"}
    same = written(tmp_path / "a.jsonl", [{"input": "a", "said": "b"}])
    other = written(tmp_path / "b.jsonl", [{"instruction": "i", "input": "a", "output": "b"}])
    assert read_rows(same, columns=columns, need_columns=False) == [Row(0, "a", "", ("b",))]
    assert read_rows(other, columns=columns, need_columns=False) == [Row(0, "i", "a", ("b",))]


def test_unknown_names_of_columns_are_a_problem_of_the_config(tmp_path: Path) -> None:
    data = InstructionData(train=written(tmp_path / "a.jsonl"), columns={"respons": "x"})
    (problem,) = data.problems()
    assert problem.startswith(
        "data.columns has 'respons', which is not a key of ours; allowed: instruction, input, resp"
    )


def test_bad_lines_of_one_cause_stand_together_and_no_cause_is_lost() -> None:
    problems = Problems("data")
    for message in ("a:1: x: y", "row 1 has tools", "a:2: x: y", "row 2 has tools", "a:3: z"):
        problems.add(message)
    with pytest.raises(ValueError, match=r"5 bad") as caught:
        problems.raise_any()
    assert str(caught.value).splitlines()[1:] == [
        "  a:1, a:2: x: y",
        "  row 1 has tools",
        "  row 2 has tools",
        "  a:3: z",
    ]
