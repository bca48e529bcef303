"""Streamed data: its order, its steps, and going on from any place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deltakd.data import InstructionData, LoadedSets, TextData
from deltakd.data.batches.data_module import DistillationData
from deltakd.data.encoding.example_stream import Counts
from deltakd.data.sources.shards import ROW_BITS
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
    assert one.counts == Counts(rows=17, examples=20, tokens=one.counts.tokens)
    cut = loader(made, max_epochs=1, max_steps=3)
    assert len(list(cut)) == len(cut) == 6


def test_limit_keeps_the_first_rows_of_every_pass(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    made = settings(folder, limit=5).load(tokenizer)
    seen = numbers(loader(made, batch_size=5, accumulate=1))
    first = [0, 1, 2, 2 << ROW_BITS, (2 << ROW_BITS) + 1]
    assert sorted(seen[:5]) == sorted(seen[5:]) == first


def test_tasks_of_other_sets_are_left_out_and_counted(
    folder: Path, write: Callable[[str, Any], str], tokenizer: PreTrainedTokenizerFast
) -> None:
    banned = write("test.jsonl", [{"instruction": "4 SAY"}, {"instruction": "9 say"}])
    val = write("val.jsonl", rows(1))
    indexed = settings(sorted(map(str, folder.glob("[024].*"))), streaming=False, exclude=[banned], val=val)
    made = settings(folder, exclude=[banned], val=val).load(tokenizer)
    batches = loader(made, batch_size=1, accumulate=1, max_epochs=1)
    answered = {tokenizer.decode(row).split(" say")[0] for batch in batches for row in batch.input_ids.tolist()}
    assert len(answered) == 14
    assert batches.counts.excluded == 3
    read = indexed.split()
    assert (len(read.train), read.excluded) == (13, 3)
