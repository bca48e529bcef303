from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltakd.evaluation import EvaluationSet, answer_set, evaluate_set, matches, score, summarise
from deltakd.generation import Decoding
from deltakd.generation.model_step import end_tokens
from deltakd.io.files import read_json_lines, write_json_lines
from tests.generation.tiny_models import EOS, PAD, POSITIONS, VOCAB, make_model, make_tokenizer

TOKENIZER = make_tokenizer()
DECODING = Decoding(max_new_tokens=8)


def make_set() -> EvaluationSet:
    prompts = ["What is it?", "Say so:", "Go"]
    return EvaluationSet(
        name="toy",
        row_ids=[4, 7, 9],
        prompts=prompts,
        prompt_ids=[TOKENIZER(prompt)["input_ids"] for prompt in prompts],
        references=[("it is it", "that"), ("so",), ("gone",)],
        asked={"template": "alpaca", "max_prompt_length": 256},
    )


def evaluate(seed: int = 10, **options: Any) -> list[dict[str, Any]]:
    settings = {"decoding": DECODING, "batch_size": 2, "vocab_size": len(TOKENIZER), "pad_id": PAD, **options}
    return evaluate_set(make_model("gpt2"), TOKENIZER, make_set(), seeds=[seed], **settings)[seed]


def test_records_hold_everything_that_shaped_them() -> None:
    records = evaluate()
    assert [record["row_id"] for record in records] == [4, 7, 9]
    first = records[0]
    assert first["prompt"] == "What is it?"
    assert first["prompt_tokens"] == 11
    assert first["reference"] == ["it is it", "that"]
    assert len(first["output"]) == first["output_tokens"] <= 8
    assert first["decoding"] == {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "no_repeat_ngram_size": 0,
        "max_new_tokens": 8,
        "seed": 10,
        "eos_ids": [EOS],
    }
    assert first["finished"] == (first["output_tokens"] < 8)
    assert first["protocol"] == {"template": "alpaca", "max_prompt_length": 256, "scorer": "rouge"}
    scores = score([record["output"] for record in records], [record["reference"] for record in records])
    assert [{key: record[key] for key in scores[0]} for record in records] == scores


def test_an_answer_that_ran_out_of_tokens_or_positions_is_not_finished() -> None:
    model = make_model("gpt2")
    model.generation_config.eos_token_id = list(range(1, VOCAB, 6))
    rows = list(range(40))
    long = EvaluationSet("long", rows, [""] * 40, [[5] * (POSITIONS - 4)] * 40, [("a",)] * 40)
    options = {"seeds": [1], "batch_size": 40, "vocab_size": len(TOKENIZER), "pad_id": PAD}
    records = answer_set(model, TOKENIZER, long, decoding=DECODING, **options)[1]
    assert {(r["output_tokens"], r["finished"]) for r in records} == {
        (0, True), (1, True), (2, True), (3, True), (4, False),
    }  # fmt: skip


def test_the_batch_size_leaves_no_trace_and_seeds_do() -> None:
    assert evaluate(batch_size=1) == evaluate(batch_size=3)
    assert [r["output"] for r in evaluate(seed=11)] != [r["output"] for r in evaluate(seed=10)]


def test_end_tokens_join_tokenizer_and_generation_config() -> None:
    model = make_model("gpt2")
    model.generation_config.eos_token_id = [5, 6]
    assert end_tokens(model, TOKENIZER) == {EOS, 5, 6}
    model.generation_config.eos_token_id = 5
    assert end_tokens(model, TOKENIZER) == {EOS, 5}
    model.generation_config.eos_token_id = None
    assert end_tokens(model, TOKENIZER) == {EOS}


def test_a_set_must_be_consistent() -> None:
    with pytest.raises(ValueError, match="'toy' has lists of unequal length"):
        replace(make_set(), prompts=["one"])
    with pytest.raises(ValueError, match="'toy' repeats row ids"):
        replace(make_set(), row_ids=[4, 4, 9])


def test_stored_records_match_only_the_same_question(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "toy.jsonl"
    assert read_json_lines(path) is None
    write_json_lines(path, evaluate())
    records = read_json_lines(path)
    assert records == evaluate()
    toy = make_set()
    assert matches(records, toy, DECODING, 10)
    assert not matches(records, toy, DECODING, 11)
    assert not matches(records, toy, replace(DECODING, top_k=5), 10)
    assert not matches(records[:2], toy, DECODING, 10)
    assert not matches([{}] * 3, toy, DECODING, 10)
    for change in (
        {"row_ids": [4, 7, 8]},
        {"prompts": ["What is it?", "Say so:", "Gone"]},
        {"prompt_ids": [*toy.prompt_ids[:2], [3]]},
        {"references": [("it is it",), ("so",), ("gone",)]},
    ):
        assert not matches(records, replace(toy, **change), DECODING, 10), change


def test_files_keep_every_character_and_replace_older_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_json_lines(path, [{"output": "old"}])
    records = [{"output": 'a\nb\u2028c\r\u0085 東京 \U0001f600 \\ " \x00'}, {"output": ""}]
    write_json_lines(path, records)
    assert read_json_lines(path) == records
    assert "東京" in path.read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_json_lines(path, [{"output": "old"}])
    with pytest.raises(TypeError):
        write_json_lines(path, [{"output": "new"}, {"output": object()}])
    assert read_json_lines(path) == [{"output": "old"}]
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2, is not JSON"):
        read_json_lines(path)


def rows(values: dict[int, float]) -> list[dict[str, Any]]:
    names = ("rouge1", "rouge2", "rougeL", "exact_match", "output_tokens")
    return [{"row_id": row, **dict.fromkeys(names, value)} for row, value in values.items()]


def test_the_summary_averages_seeds_before_rows() -> None:
    # Seeds list their rows in different orders; rows average 2, 4 and 9.
    summary = summarise({10: rows({1: 0, 2: 4, 3: 10}), 20: rows({3: 8, 2: 4, 1: 4})})
    assert summary["rougeL"] == pytest.approx(5)
    assert summary["rougeL_stderr"] == pytest.approx(np.std([2, 4, 9], ddof=1) / np.sqrt(3))
    assert summary["output_tokens"] == pytest.approx(5)
    # The seeds' means are 14/3 and 16/3.
    assert summary["rougeL_seed_std"] == pytest.approx(np.std([14 / 3, 16 / 3], ddof=1))
    assert set(summary) == {
        *(f"{m}{end}" for m in ("rouge1", "rouge2", "rougeL", "exact_match") for end in ("", "_stderr", "_seed_std")),
        "output_tokens",
    }


def test_the_summary_of_one_row_has_no_spread() -> None:
    summary = summarise({10: rows({1: 3.0})})
    assert summary["rouge1_stderr"] == 0.0
    assert "rouge1_seed_std" not in summary


def test_a_summary_needs_the_same_rows_under_each_seed() -> None:
    with pytest.raises(ValueError, match=r"Seeds 10 and 20 cover different rows, such as \[2\]"):
        summarise({10: rows({1: 3.0}), 20: rows({1: 3.0, 2: 1.0})})
    with pytest.raises(ValueError, match="nothing to average"):
        summarise({})
    with pytest.raises(ValueError, match="nothing to average"):
        summarise({10: []})
