from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from deltakd.data.sources.readers import read_rows, read_texts
from deltakd.data.sources.records import missing_sources

Write = Callable[[str, Any], str]


def records(count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"i{n}", "output": f"o{n}", "part": "ab"[n % 2]} for n in range(count)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_files(write: Write, name: str) -> None:
    path = write(name, json.dumps(records(3)) if name == "a.json" else records(3))
    rows = read_rows(path)
    assert [(row.id, row.instruction, row.responses) for row in rows] == [(n, f"i{n}", (f"o{n}",)) for n in range(3)]


def test_ids_run_over_the_lines_of_several_sources(write: Write) -> None:
    first, second = write("a.jsonl", records(4)), write("b.jsonl", records(3))
    rows = read_rows([f"{first}#part=a", second])
    assert [row.id for row in rows] == [0, 2, 4, 5, 6]
    assert [row.id for row in read_rows([first, second], limit=5)] == [0, 1, 2, 3, 4]


def test_blank_lines_count_as_lines(write: Write) -> None:
    first, _, second = (json.dumps(record) for record in records(3))
    assert [row.id for row in read_rows(write("a.jsonl", f"{first}\n\n{second}\n"))] == [0, 2]


def test_subset_keeps_line_numbers(write: Write) -> None:
    path = write("a.jsonl", records(6))
    split = write("split.json", json.dumps({"note": "x", "train": [5, 1, None], "dev": [0, 9], "none": []}))
    assert [row.id for row in read_rows(path, subset=f"{split}#train")] == [1, 5]
    other = write("b.jsonl", records(2))
    assert [row.id for row in read_rows([path, other], subset={path: f"{split}#train"})] == [1, 5, 6, 7]
    with pytest.raises(ValueError, match="has no list 'test'; it has: train, dev, none"):
        read_rows(path, subset=f"{split}#test")
    with pytest.raises(ValueError, match=r"names line 9, but .* ends at line 5"):
        read_rows(path, subset=f"{split}#dev")
    with pytest.raises(ValueError, match="keeps none of its 6 lines"):
        read_rows(path, subset=f"{split}#none")
    with pytest.raises(ValueError, match="cannot tell which of 2 sources"):
        read_rows([path, other], subset=f"{split}#train")
    with pytest.raises(ValueError, match=r"must be file.json#key"):
        read_rows(path, subset=split)


def test_all_bad_lines_are_reported_together(write: Write) -> None:
    lines = ['{"instruction": "a", "output": "b"}', "{oops", "[1]", '{"instruction": "a"}', *["x"] * 20]
    with pytest.raises(ValueError, match=r"23 bad record\(s\)") as caught:
        read_rows(write("a.jsonl", "\n".join(lines)))
    text = str(caught.value)
    assert "a.jsonl:2: not JSON: Expecting property name" in text
    assert "a.jsonl:3: expected a JSON object, got list" in text
    assert "a.jsonl:4: no response; keys found: instruction" in text
    assert "a.jsonl:7 and 17 more: not JSON: Expecting value" in text
    assert len(text.splitlines()) == 5


def test_unusable_files(write: Write) -> None:
    with pytest.raises(ValueError, match=r"no such file: nowhere/a.jsonl"):
        read_rows("nowhere/a.jsonl")
    with pytest.raises(ValueError, match=r"unknown kind of source.*\.jsonl, \.json, \.csv, \.tsv"):
        read_rows(write("a.xlsx", "x"))
    with pytest.raises(ValueError, match="unknown kind of source: 'squad'"):
        read_rows("squad")
    with pytest.raises(ValueError, match="is empty"):
        read_rows(write("empty.jsonl", ""))
    with pytest.raises(ValueError, match=r"b.json:1: not JSON"):
        read_rows(write("b.json", "{"))
    with pytest.raises(ValueError, match="expected a JSON list of records, or an object with"):
        read_rows(write("c.json", "{}"))
    broken = Path(write("a.jsonl.gz", "x"))
    broken.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"cannot read .*a.jsonl.gz"):
        read_rows(str(broken))


def test_filters(write: Write) -> None:
    path = write("a.jsonl", records(4))
    with pytest.raises(ValueError, match="no record has part = 'c'; values found: a, b"):
        read_rows(f"{path}#part=c")
    with pytest.raises(ValueError, match="must be field=value"):
        read_rows(f"{path}#part")


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split, download_config: records(2) if split == "train" else None
    )
    assert [row.instruction for row in read_rows("org/name")] == ["i0", "i1"]

    def fail(name: str, split: str, download_config: datasets.DownloadConfig) -> None:
        raise ConnectionError("no network\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ValueError, match=r"cannot load data set 'org/name' .*no network\).*path of a local file"
    ) as caught:
        read_rows("org/name")
    assert "\n" not in str(caught.value)


def test_file_of_a_hub_data_set(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("x.jsonl", records(2))
    asked = []

    def download(name: str, file: str, repo_type: str, local_files_only: bool) -> str:
        asked.append((name, file, repo_type))
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(read_rows("org/name:sub/x.jsonl")) == 2
    assert asked == [("org/name", "sub/x.jsonl", "dataset")]


def test_missing_sources(write: Write) -> None:
    path = write("a.jsonl", records(1))
    given = {
        "data.train": [path, "org/name", "org/name:x.jsonl", "gone/a.jsonl"],
        "data.val": None,
        "data.exclude": "b",
    }
    found = missing_sources(given)
    assert len(found) == 2
    assert found[0].startswith("data.train: no such file: gone/a.jsonl")
    assert found[1].startswith("data.exclude: unknown kind of source: 'b'")


def test_texts(write: Write) -> None:
    plain = write("a.txt.gz", "one\n\ntwo\n<|endoftext|>\nthree\n")
    stories = write("b.jsonl", [{"text": "four", "split": "train"}, {"text": "five", "split": "valid"}])
    rows = write("c.jsonl", [{"instruction": "do", "input": "this", "output": "done"}])
    assert read_texts([plain, f"{stories}#split=train", rows]) == ["one\n\ntwo", "three", "four", "do\nthis\ndone"]
    assert read_texts([plain, stories], limit=3) == ["one\n\ntwo", "three", "four"]
    split = write("split.json", '{"x": [1]}')
    assert read_texts(stories, subset={stories: f"{split}#x"}) == ["five"]


def test_unusable_texts(write: Write) -> None:
    plain = write("a.txt", "\n\n")
    with pytest.raises(ValueError, match=r"a.txt is empty"):
        read_texts(plain)
    with pytest.raises(ValueError, match="plain text file has no records"):
        read_texts(f"{plain}#split=train")
    with pytest.raises(ValueError, match="text must be a non-empty string"):
        read_texts(write("b.jsonl", [{"text": ""}]))
    with pytest.raises(ValueError, match="given twice"):
        read_texts([plain, plain])
    with pytest.raises(ValueError, match="subset names unknown source"):
        read_texts(plain, subset={"other": "s.json#x"})


def test_shared_split_matches_its_file(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "dolly"
    rows = read_rows(str(folder / "databricks-dolly-15k.jsonl.gz"), subset=f"{folder / 'minillm_split.json'}#train")
    assert len(rows) == 13450
    assert [row.id for row in rows[:3]] == [0, 1, 3]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_a_byte_order_mark_is_no_text(write: Write, name: str) -> None:
    path = write(name, "\ufeff" + (json.dumps(records(2)) if name == "a.json" else json.dumps(records(2)[0])))
    assert read_rows(path)[0].instruction == "i0"
    assert read_texts(write("a.txt", "\ufeffone")) == ["one"]
    split = write("split.json", "\ufeff" + json.dumps({"train": [0]}))
    assert len(read_rows(path, subset=f"{split}#train")) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_is_named_with_file_and_row(write: Write, name: str) -> None:
    bad = [{"instruction": "a", "output": "cut \ud83d"}, {"messages": [{"role": "user", "content": "\udc00"}]}]
    rows = [*records(1), *bad]
    with pytest.raises(ValueError, match=r"2 bad record\(s\)") as caught:
        read_rows(write(name, json.dumps(rows) if name == "a.json" else rows))
    first, second = ("a.json[1]", "a.json[2]") if name == "a.json" else ("a.jsonl:2", "a.jsonl:3")
    assert f"{first}: 'output' has half a character" in str(caught.value)
    assert f"{second}: 'messages' has half a character" in str(caught.value)
    str(caught.value).encode()
    whole = write("whole.jsonl", '{"instruction": "\\ud83d\\ude00", "output": "b"}')
    assert read_rows(whole)[0].instruction == "\U0001f600"


def test_keys_that_nobody_reads_are_named_once_for_a_file(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "audio": 0}
    chats = [
        {"messages": [user, answer], "functions": [{"name": "f"}]},
        {"messages": [user, answer | {"audio": None, "refusal": [1]}, user, answer], "functions": []},
    ]
    plain = [{"output": "b", "system": "s", "context": "c", "prompt": "P", "part": "x"}]
    first, second = write("chat.jsonl", chats), write("plain.jsonl", plain)
    for _ in range(2):
        read_rows([first, f"{second}#part=x"])
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [
        f"{first}: these keys are not read: functions (1 row), messages[].audio (2 rows), messages[].refusal (1 row).",
        f"{second}: these keys are not read: context (1 row), system (1 row).",
    ]
