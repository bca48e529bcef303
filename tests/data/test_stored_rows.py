from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from deltakd.data import Row, load, load_instruction_sets, read_rows
from deltakd.data.encoding import token_table
from deltakd.data.encoding.workers import in_order, usable_processes
from deltakd.data.sources import prepared
from deltakd.data.sources.prepared import prepared_rows
from deltakd.data.sources.stored_rows import rows_digest, store_rows

Write = Callable[[str, Any], str]
TURNS = ({"role": "user", "content": "tab\there"}, {"role": "assistant", "content": "line\nend"})
CALL = {"type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": None}}}
ROWS = [
    Row(3, "Wer schrieb “Emma”?", "é\t\n", ("Austen", "Jane \\ Austen"), category="qa", where="a\tb.jsonl:4"),
    Row(5, prompt="verbatim", responses=("yes",), where="a.jsonl:6"),
    Row(8, messages=(*TURNS, {"role": "assistant", "content": "", "tool_calls": [CALL]}), tools=({"b": 1, "a": [2]},)),
    Row(9, "no answer"),
]


def test_rows_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    stored = store_rows(iter(ROWS), "rows", tmp_path)
    for rows in (stored, store_rows([], "rows", tmp_path), store_rows(ROWS)):
        assert list(rows) == [rows[n] for n in range(4)] == ROWS
        assert [row.where for row in rows] == [row.where for row in ROWS]
        assert list(rows[1:3]) == ROWS[1:3]
        assert list(rows.take(np.array([3, 0]))) == [ROWS[3], ROWS[0]]
        # A template may write a call's arguments in their order.
        assert str(list(rows)) == str(ROWS)
        assert rows.ids.tolist() == [3, 5, 8, 9]
        assert rows_digest(rows) == rows_digest(ROWS)
    assert rows_digest(stored[:3]) == rows_digest(ROWS[:3]) != rows_digest(ROWS)
    assert rows_digest([replace(ROWS[0], where="elsewhere"), *ROWS[1:]]) == rows_digest(ROWS)


@pytest.fixture
def options(write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> dict[str, Any]:
    source = write("train.jsonl", [{"instruction": f"Do {n}", "output": f"answer {n}"} for n in range(30)])
    template = {"with_input": "{instruction}|{input}>", "without_input": "{instruction}>", "tail": ">"}
    options = {"train": source, "template": template, "max_length": 50, "max_prompt_length": 20, "val_size": 5}
    return options | {"tokenizer": tokenizer, "cache_dir": tmp_path / "cache"}


def test_the_second_start_reads_no_rows(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_instruction_sets(**options)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "iter_rows", None)
        patch.setattr(load, "_chosen", None)
        patch.setattr("deltakd.data.encoding.two_tokenizers.encode_batch", None)
        second = load_instruction_sets(**options)
    plain = load_instruction_sets(**options | {"cache_dir": None})
    for other in (second, plain):
        assert list(other.train) == list(first.train)
        assert other.train.fingerprint == first.train.fingerprint
        assert list(other.val_rows) == list(first.val_rows)
        assert other.counts == first.counts
    assert isinstance(second.train.input_ids.base, np.memmap)


def test_a_change_that_leaves_size_and_time_alone_is_seen(options: dict[str, Any]) -> None:
    file = Path(options["train"])
    first, _ = prepared_rows(str(file), cache_dir=options["cache_dir"])
    held = file.stat()
    file.write_text(file.read_text().replace("answer 7", "answer 8"))
    os.utime(file, ns=(held.st_atime_ns, held.st_mtime_ns))
    second, _ = prepared_rows(str(file), cache_dir=options["cache_dir"])
    assert (first[7].responses, second[7].responses) == (("answer 7",), ("answer 8",))
    assert list(second) == read_rows(str(file))


def test_bad_rows_leave_nothing_behind(write: Write, tmp_path: Path) -> None:
    source = write("bad.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "c"}])
    for _ in range(2):
        with pytest.raises(ValueError, match="1 bad record"):
            prepared_rows(source, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("processes", ["1", "3"])
def test_processes_give_the_table_of_one(
    options: dict[str, Any], processes: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = load_instruction_sets(**options | {"cache_dir": None})
    monkeypatch.setattr(token_table, "BATCH", 4)
    monkeypatch.setattr(token_table, "LONG_TABLE", 1)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.setenv("RAYON_NUM_THREADS", processes)
    options["tokenizer"](["threads", "before", "the fork"])
    found = load_instruction_sets(**options)
    assert list(found.train) == list(plain.train)
    assert found.counts == plain.counts
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match=r"raise these keys or set data.overlong=cut"):
        load_instruction_sets(**options | {"max_length": 6, "max_prompt_length": 5, "overlong": "drop"})


def test_one_process_where_threads_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert usable_processes() == 1
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("RAYON_NUM_THREADS", "5")
    assert usable_processes() == (5 if sys.platform == "linux" else 1)


def test_a_hub_data_set_is_found_again_until_its_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(answer: str) -> None:
        folder = tmp_path / answer
        datasets.Dataset.from_list([{"instruction": "Do it", "output": answer}]).save_to_disk(str(folder))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.load_from_disk(str(folder)))

    def answers() -> tuple[str, ...]:
        (row,), key = prepared_rows("org/name", cache_dir=tmp_path / "cache")
        assert key is not None
        return row.responses

    publish("yes")
    assert answers() == ("yes",)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "iter_rows", None)
        assert answers() == ("yes",)
    publish("no")
    assert answers() == ("no",)


def test_a_killed_process_is_told_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"was killed.*RAYON_NUM_THREADS=1"):
        list(in_order(lambda number: os._exit(number), 4, 2))
