"""Streamed data: its order, its steps, and going on from any place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from deltakd.data import InstructionData, LoadedSets, TextData
from deltakd.data.batches.data_module import DistillationData
from deltakd.data.encoding.example_stream import Counts
from deltakd.data.routing import routed
from deltakd.data.sources import shards
from deltakd.data.sources.shards import ROW_BITS, _open_hub, list_shards, read_shard_rows
from deltakd.types import Batch

PAD = 0


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Answers of different lengths; the first word is the row's number."""
    return [{"instruction": f"{n} say", "output": "ha " * (1 + n * 7 % 5)} for n in range(first, first + count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards with 3, 0, 8, 1 and 5 rows, numbered through."""
    done = 0
    (tmp_path / "shards").mkdir()
    for shard, count in enumerate((3, 0, 8, 1, 5)):
        text = "".join(json.dumps(row) + "\n" for row in rows(count, done)).encode()
        name = tmp_path / "shards" / f"{shard}.jsonl"
        name.with_suffix(".jsonl.gz" if shard % 2 else ".jsonl").write_bytes(gzip.compress(text) if shard % 2 else text)
        done += count
    return tmp_path / "shards"


def settings(train: Any, **changes: Any) -> InstructionData:
    options: dict[str, Any] = {
        "streaming": True,
        "shuffle_buffer": 6,
        "max_length": 64,
        "max_prompt_length": 40,
        "template": {"with_input": "{instruction}{input}:", "without_input": "{instruction}:", "tail": ":"},
    }
    return InstructionData(train=train if isinstance(train, list) else str(train), **options | changes)


def loader(sets: LoadedSets, *, rank: int = 0, seed: int = 0, **changes: Any) -> Any:
    options: dict[str, Any] = {"batch_size": 2, "accumulate": 2, "max_epochs": 2, "max_steps": 1000}
    stream = None if sets.stream is None else sets.stream.start(seed)
    data = DistillationData(sets.train, None, PAD, seed=seed, stream=stream, **options | changes)
    data._place = lambda: (rank, data.world_size or 1)  # type: ignore[method-assign]
    return data.train_dataloader()


def shown(batches: Iterator[Batch] | Any) -> list[Any]:
    return [(b.step, b.step_tokens, b.row_ids.tolist(), b.input_ids.tolist(), b.labels.tolist()) for b in batches]


def numbers(batches: Any) -> list[int]:
    return [row for batch in batches for row in batch.row_ids.tolist()]


def test_each_pass_has_every_row_once_in_an_order_of_its_own(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    made = settings(folder).load(tokenizer)
    seen = numbers(loader(made, batch_size=1, accumulate=1))
    first, second = seen[:17], seen[17:]
    assert len(set(first)) == 17
    assert set(first) == set(second)
    assert first != second
    assert sorted(first) == [(s << ROW_BITS) + r for s, n in enumerate((3, 0, 8, 1, 5)) for r in range(n)]
    assert seen == numbers(loader(made, batch_size=1, accumulate=1))
    assert seen != numbers(loader(made, batch_size=1, accumulate=1, seed=1))


def test_ranks_share_each_step_and_its_rows_do_not_depend_on_their_number(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = settings(folder, max_tokens_per_batch=None).load(tokenizer)
    alone = list(loader(made, batch_size=2, accumulate=4))
    ranks = [list(loader(made, rank=rank, world_size=2, batch_size=2, accumulate=2)) for rank in (0, 1)]
    steps = alone[-1].step + 1
    for step in range(steps):
        whole = [b for b in alone if b.step == step]
        parts = [[b for b in of_rank if b.step == step] for of_rank in ranks]
        assert sorted(numbers(whole)) == sorted(numbers(parts[0]) + numbers(parts[1]))
        assert not set(numbers(parts[0])) & set(numbers(parts[1])) or len(set(numbers(whole))) < 8
        together = whole + parts[0] + parts[1]
        assert {b.step_tokens for b in together} == {sum(len(b.labels_N) for b in whole)}


@pytest.mark.parametrize("budget", [False, True])
def test_steps_are_those_of_the_indexed_path_where_the_buffer_holds_a_pass(
    budget: bool, write: Callable[[str, Any], str], tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write("all.jsonl", rows(83))
    options = {"batch_size": None, "max_tokens_per_batch": 130} if budget else {"batch_size": 3}
    both = [
        settings(file, streaming=streaming, shuffle_buffer=10_000, **options).load(tokenizer)
        for streaming in (False, True)
    ]
    split: dict[str, Any] = {"batch_size": options["batch_size"], "max_tokens": options.get("max_tokens_per_batch")}
    one, other = (shown(loader(made, seed=7, max_epochs=3, **split)) for made in both)
    assert len(one) == len(other)
    assert one == other


@pytest.mark.parametrize("budget", [False, True])
def test_a_stream_goes_on_the_same_from_every_position(
    budget: bool, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Through JSON, as a checkpoint is; the continuation takes no row from before the buffer of its window."""
    options = {"batch_size": None, "max_tokens_per_batch": 64} if budget else {"batch_size": 2}
    split: dict[str, Any] = {"batch_size": options["batch_size"], "max_tokens": options.get("max_tokens_per_batch")}
    made = settings(folder, **options).load(tokenizer)
    whole = loader(made, **split)
    batches, states = [], [json.dumps(whole.state_dict())]
    for batch in whole:
        batches.append(batch)
        states.append(json.dumps(whole.state_dict()))
    assert len(batches) > 6
    for position, state in enumerate(states):
        again = loader(settings(folder, **options).load(tokenizer), **split)
        again.load_state_dict(json.loads(state))
        assert shown(again) == shown(batches[position:]), position
        assert again.counts == whole.counts
        assert len(state) < 400


def test_text_is_packed_over_documents_shards_and_passes(
    write: Callable[[str, Any], str], tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = ["ab " * n for n in (3, 40, 1, 2, 90, 7)]
    write("a.txt", "\n<|endoftext|>\n".join(texts[:3]))
    write("b.jsonl.gz", [{"text": text} for text in texts[3:]])
    sources = [
        write("a.txt", "\n<|endoftext|>\n".join(texts[:3])),
        write("b.jsonl.gz", [{"text": t} for t in texts[3:]]),
    ]
    # One row at a time is a stream that is not shuffled within the shards.
    data = TextData(train=sources, streaming=True, shuffle_buffer=1, max_length=16, max_tokens=900)
    made = data.load(tokenizer)
    batches = list(loader(made, batch_size=2, accumulate=2, max_epochs=None, max_steps=None))
    assert len(batches) == 2 * -(-900 // 64)
    flat = [token for batch in batches for token in batch.input_ids.flatten().tolist()]
    one_pass = [[*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for t in texts]
    one_pass[:3] = [[*tokenizer(t.strip("\n"), add_special_tokens=False)["input_ids"], 2] for t in texts[:3]]
    orders = [[t for d in one_pass[:3] + one_pass[3:] for t in d], [t for d in one_pass[3:] + one_pass[:3] for t in d]]
    while flat:
        order = next(order for order in orders if order[: len(flat)] == flat[: len(order)])
        flat = flat[len(order) :]
    assert {batch.step_tokens for batch in batches} == {4 * 15}
    assert numbers(batches) == list(range(len(batches) * 2))


def test_text_goes_on_the_same_from_every_position(
    write: Callable[[str, Any], str], tokenizer: PreTrainedTokenizerFast
) -> None:
    sources = [write(f"{n}.txt", "\n<|endoftext|>\n".join("xy " * (n + k) for k in range(6))) for n in (1, 20, 3)]
    data = TextData(train=sources, streaming=True, shuffle_buffer=4, max_length=32, max_tokens=2000)
    whole = loader(data.load(tokenizer), max_epochs=None, max_steps=None)
    batches, states = [], [whole.state_dict()]
    for batch in whole:
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.state_dict())))
    for position, state in enumerate(states):
        again = loader(data.load(tokenizer), max_epochs=None, max_steps=None)
        again.load_state_dict(state)
        assert shown(again) == shown(batches[position:]), position


def test_the_run_ends_with_the_passes_and_says_so(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    made = settings(folder).load(tokenizer)
    one = loader(made, max_epochs=1)
    assert len(one) == 2000
    assert len(list(one)) == 2 * 5  # 17 rows in steps of 4: the last takes 3 of the next pass
    assert one.total_steps == 5
    assert one.counts == Counts(rows=20, examples=20, tokens=one.counts.tokens)
    cut = loader(made, max_epochs=1, max_steps=3)
    assert len(list(cut)) == len(cut) == 6
    # Of the rows drawn together with those of the last step, only these count.
    assert cut.counts[:2] == (12, 12)


def test_texts_that_do_not_fill_a_block_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("a few words")
    made = TextData(train=str(tmp_path / "a.txt"), streaming=True, max_length=64).load(tokenizer)
    with pytest.raises(ValueError, match=r"\(1 documents\) does not fill one block of 64 tokens; .*data.max_length"):
        list(loader(made))


def test_limit_keeps_the_first_rows_of_every_pass(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    made = settings(folder, limit=5).load(tokenizer)
    seen = numbers(loader(made, batch_size=5, accumulate=1))
    first = [0, 1, 2, 2 << ROW_BITS, (2 << ROW_BITS) + 1]
    assert sorted(seen[:5]) == sorted(seen[5:]) == first


def test_tasks_of_other_sets_are_left_out_and_counted(
    folder: Path, write: Callable[[str, Any], str], tokenizer: PreTrainedTokenizerFast
) -> None:
    long = "which of the seven planets is the one that has rings of ice around it"
    near = [{"instruction": f"say {long}", "output": "x"}]
    (folder / "9.jsonl").write_text("".join(json.dumps(row) + "\n" for row in near))
    banned = write("test.jsonl", [{"instruction": "4 SAY"}, {"instruction": "9 say"}, {"instruction": long}])
    val = write("val.jsonl", rows(1))
    indexed = settings(sorted(map(str, folder.glob("[0249].*"))), streaming=False, exclude=[banned], val=val)
    made = settings(folder, exclude=[banned], val=val, shuffle_buffer=100).load(tokenizer)
    batches = loader(made, batch_size=1, accumulate=1, max_epochs=1)
    answered = {tokenizer.decode(row).split(" say")[0] for batch in batches for row in batch.input_ids.tolist()}
    assert len(answered) == 14
    # Two tasks, a near duplicate, and a row of the validation set.
    assert batches.counts.excluded == 4
    read = indexed.split()
    assert (len(read.train), read.excluded) == (13, 4)


def test_bad_shards_are_named_when_they_are_read(
    folder: Path, write: Callable[[str, Any], str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Mistakes in the first rows show at once, others where the stream comes to them."""
    bad = tmp_path / "bad"
    bad.mkdir()
    good = [json.dumps(row) for row in rows(100)]

    def error(content: bytes, suffix: str = ".jsonl") -> str:
        for old in bad.iterdir():
            old.unlink()
        (bad / f"0{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=r".") as caught:
            list(loader(settings(bad).load(tokenizer), max_epochs=1))
        return str(caught.value)

    assert "0.jsonl:98: not JSON" in error("\n".join([*good[:97], "{", *good[98:]]).encode())
    assert "0.jsonl:98: no response" in error("\n".join([*good[:97], '{"instruction": "a"}', *good[98:]]).encode())
    assert "0.jsonl:1: not JSON" in error(b"x")
    assert "can't read" in error(gzip.compress("\n".join(good * 20).encode())[:-20], ".jsonl.gz").replace("not", "'t")
    assert "empty; give data with at least one row" in error(b"\n")
    assert "has no file that can be read" in error(b"", ".exe")


def test_columns_that_the_first_rows_lack_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"ask": row["instruction"], "out": row["output"]}) + "\n" for row in rows(9)))
    with pytest.raises(ValueError, match=r"columns has {instruction: asK}, .*none of the first 64 .*are: ask, out$"):
        settings(path, columns={"instruction": "asK", "response": "out"}).load(tokenizer)
    # The rows can be used without an input, and a later one may have it.
    settings(path, columns={"instruction": "ask", "response": "out", "input": "ctx"}).load(tokenizer)
    assert "data.columns has {input: ctx}, but none of the first 64 records" in caplog.text
    caplog.clear()
    settings(path, columns={"instruction": "ask", "response": "out"}).load(tokenizer)
    assert not caplog.text


def test_a_shard_that_changes_or_goes_is_named_in_the_next_pass(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for change, message in ((lambda file: file.write_bytes(b"{}"), "4.jsonl has changed"), (Path.unlink, "4.jsonl")):
        made = settings(folder).load(tokenizer)
        change(folder / "4.jsonl")
        with pytest.raises(ValueError, match=message):
            list(loader(made))
        (folder / "4.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(5, 12)))


def test_a_token_that_the_models_lack_is_named(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    made = settings(folder).load(tokenizer)
    assert made.stream is not None
    stream = made.stream.start(0)
    stream.vocabulary = 50
    with pytest.raises(ValueError, match=r"of the stream has the token .*the models share only 50"):
        next(stream.examples())


def test_rows_of_a_stream_go_to_the_pairs_of_their_tasks(
    write: Callable[[str, Any], str], tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """As those of an indexed set do; a task that appears later is named with its row."""
    each = rows(70)
    for number, row in enumerate(each[:66]):
        row["task"] = "ab"[number % 2]
    file = write("tasks.jsonl", each)
    found = []
    for streaming in (False, True):
        made = settings(file, streaming=streaming, shuffle_buffer=100).load(tokenizer)
        batches = loader(routed(made, {"b": 2, "*": 3}), max_epochs=1)
        found.append([[(r.pair, r.tokens.tolist(), r.stream.input_ids.tolist()) for r in b.routes] for b in batches])
    assert found[0] == found[1]
    assert {pair for routes in found[0] for pair, _, _ in routes} == {2, 3}
    with pytest.raises(ValueError, match=r"the beginning of data.train \(64 rows\) has rows of tasks .* b \(32 rows\)"):
        routed(made, {"a": 1})
    late = routed(made, {"a": 1, "b": 1, "c": 2})
    assert "names c, and no row of the beginning of data.train (64 rows) has that task" in caplog.text
    with pytest.raises(
        ValueError, match=r"row 6\d .*tasks.jsonl.* has no `task`, and model.routes has a, b, c; add it"
    ):
        list(loader(late, max_epochs=1))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl.zst", ".arrow"])
def test_shards_of_any_format_are_read_from_any_row_on(suffix: str, tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"ask": str(n), "output": "a"} for n in range(10)])
    file = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, file, row_group_size=4)
    elif suffix == ".csv":
        pyarrow.csv.write_csv(table, file)
    elif suffix == ".arrow":
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, 3)
    else:
        text = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
        with pyarrow.output_stream(file, compression="zstd") as stream:
            stream.write(text.encode())
    [shard] = list_shards(str(file), {"instruction": "ask"})
    for start in range(11):
        found = [(number, row.instruction, row.id) for number, row in read_shard_rows(shard, start)]
        assert found == [(n, str(n), n) for n in range(start, 10)]


def test_a_hub_data_set_streams_by_its_shards(
    folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``datasets`` opens a folder as it opens a repository of the hub."""
    open_builder = datasets.load_dataset_builder
    files = [str(folder / f"{number}.jsonl") for number in (0, 2, 4)]
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name, **_: open_builder("json", data_files=files, name="x")
    )
    _open_hub.cache_clear()
    made = settings("someone/rows", shuffle_buffer=3, columns={"response": "output"}).load(tokenizer)
    _open_hub.cache_clear()
    whole = loader(made, batch_size=1, accumulate=2)
    batches, states = [], []
    for batch in whole:
        batches.append(batch)
        states.append(whole.state_dict())
    assert sorted(numbers(batches)[:16]) == [(s << ROW_BITS) + r for s, n in enumerate((3, 8, 5)) for r in range(n)]
    for position in (3, 17, 30):
        again = loader(made, batch_size=1, accumulate=2)
        again.load_state_dict(states[position - 1])
        assert shown(again) == shown(batches[position:])


def test_the_memory_and_the_start_do_not_grow_with_the_data(
    write: Callable[[str, Any], str], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the second buffer is needed, no row behind the first one and the row after it is read."""
    file = write("long.jsonl", rows(5000))
    read = []
    parse = shards.parse_row
    monkeypatch.setattr(shards, "parse_row", lambda *args: read.append(args[2]) or parse(*args))
    made = settings(file, shuffle_buffer=50).load(tokenizer)
    assert max(read) < 64
    batches = iter(loader(made, batch_size=2, accumulate=1))
    read.clear()
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    # The buffer in use, those of the steps made ahead and of their window.
    assert max(read) < 50 * 8
