from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltakd.evaluate import run_evaluation
from deltakd.io.errors import ConfigError
from deltakd.io.files import read_json_lines
from deltakd.io.run_directory import RunDirectory
from tests.tiny import World, write_rows

Train = Callable[..., RunDirectory]

LONG = "Write a letter to the mayor of a small town in which you ask for more benches beside the river, and say why"


def row(instruction: str, output: Any = "yes") -> dict[str, Any]:
    return {"instruction": instruction, "input": "", "output": output}


def test_all_that_is_wrong_with_the_sets_is_told_at_once(train: Train, world: World, tmp_path: Path) -> None:
    trained = [json.loads(line) for line in (world.root / "train.jsonl").read_text().splitlines()]
    files = {
        "known": [row("Is it new?"), trained[3], row(LONG)],
        "unanswered": [row("Who?", ""), row("Who?", ["", " "]), {"instruction": "Who?"}],
        "wordy": [row("How many?", "#### 3"), row("And now?", "many")],
        "deep": [row("x " * 100), row("Short")],
    }
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    more = write_rows(tmp_path / "train.jsonl", [*trained, row(LONG + " today")])
    sets = ", ".join(f"{name}: {path}" for name, path in paths.items() if name != "wordy")
    with pytest.raises(ConfigError) as caught:
        train(
            "sft",
            "evaluation=default",
            f"evaluation.sets={{{sets}, wordy: {{source: {paths['wordy']}, scorer: final_number}}}}",
            "evaluation.allow_overlap=false",
            "evaluation.max_prompt_length=200",
            f"data.train={more}",
            "data.max_length=128",
        )
    known, unanswered, deep, wordy = caught.value.problems
    assert known.startswith(
        "evaluation set known: of 3 rows 1 are in the training data, and 1 nearly (its row = row of data.train: "
    )
    assert "2=40" in known
    assert f"data.exclude=[{paths['known']}], or evaluate all the same with evaluation.allow_overlap=true" in known
    assert "evaluation.sets.unanswered: " in unanswered
    assert "3 bad record(s)" in unanswered
    assert "1 of 2 prompts are as long as the model's context of 128 tokens (rows 0)" in deep
    assert "1 of 2 rows have a reference without a number (rows 1)" in wordy


def test_numbers_are_scored_chosen_by_and_recorded(train: Train, world: World, tmp_path: Path) -> None:
    numbered = [row(f"Count to {n}", f"<<{n}>>so #### {n}") for n in range(8)]
    path = write_rows(tmp_path / "numbers.jsonl", numbered)
    run = train(
        "sft",
        "evaluation=gsm8k",
        "evaluation.decoding.max_new_tokens=6",
        f"evaluation.sets={{numbers: {path}, words: {{source: {world.root / 'test.jsonl'}, scorer: rouge, limit: 2}}}}",
        f"data.val={path}",
        "data.strip_answers='<<[^<>]*>>'",
    )
    summary = run.read_summary()
    assert summary["meta"]["objective"] == "val/final_number"
    assert {"numbers/final_number", "numbers/final_number_lenient_stderr", "words/rougeL"} <= summary.keys()
    assert not {"numbers/rougeL", "words/final_number"} & summary.keys()
    record = summary["meta"]["evaluation"]
    assert record["protocol"] == "gsm8k"
    assert record["deviations"] == [
        "decoding.max_new_tokens is 6 instead of 256",
        "sets.words.scorer is rouge instead of final_number",
    ]
    assert record["strip_answers"] == "<<[^<>]*>>"
    assert record["sets"]["numbers"]["prompts_cut"] == 0
    assert (record["max_prompt_length"], record["seeds"], record["decoding"]["do_sample"]) == (90, [10], False)
    assert "{instruction}" in record["template_text"]
    assert record["sets"]["words"]["scorer"] == "rouge"
    assert record["sets"]["words"]["rows"] == 2
    assert record["sets"]["numbers"]["overlap"] == {"exact": [], "near": []}
    first = (read_json_lines(run.generations / "numbers_seed10.jsonl") or [{}])[0]
    assert first["reference"] == ["so #### 0"]
    assert first["protocol"]["scorer"] == "final_number"
    assert first["protocol"]["max_prompt_length"] == 90

    # Asked again under another scorer, the same texts are scored anew. What was trained on is known from the run.
    options = [f"run={run.path}", "evaluation.seeds=[10,20]", "evaluation.allow_overlap=false"]
    with pytest.raises(ConfigError, match=r"of 40 rows 40 are in the training data"):
        run_evaluation(
            [*options, f"evaluation.sets={{seen: {world.root / 'train.jsonl'}}}", f"run_dir={tmp_path / 'a'}"]
        )
    again = run_evaluation([*options, f"evaluation.sets={{numbers: {path}}}", f"run_dir={tmp_path / 'b'}"])
    assert again["numbers/final_number"] == summary["numbers/final_number"]
    assert again["numbers/final_number_seed_std"] == 0
    assert again["meta"]["evaluation"]["deviations"][0] == "seeds is [10, 20] instead of [10]"


RUSSIAN = ("Москва", "Казань", "Тверь")


def test_references_that_no_scorer_reads_are_told_before_training(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Validation rows among them: their answers choose the best checkpoint."""
    russian = write_rows(tmp_path / "russian.jsonl", [row(f"{n}?", city) for n, city in enumerate(RUSSIAN)])
    mixed = write_rows(tmp_path / "mixed.jsonl", [row("a", "Москва"), row("b", ["Казань", "Kazan"]), row("c", "…")])
    rouge = ("sft", "evaluation=default", f"data.val={russian}", f"evaluation.sets={{mixed: {mixed}}}")
    with pytest.raises(ConfigError) as caught:
        train(*rouge, f"evaluation.sets={{cities: {russian}, mixed: {mixed}}}")
    said = (
        "3 of 3 rows have references in which ROUGE finds no word (rows 0, 1, 2), so that every answer scores 0 there; "
        "evaluation.rouge_tokenizer=unicode reads 3 of them, with other numbers than published ones"
    )
    assert caught.value.problems == [f"the validation rows: {said}", f"evaluation set cities: {said}"]
    assert "evaluation set mixed: 2 of 3 rows have references in which ROUGE finds no word (rows 0, 2)" in caplog.text
    with pytest.raises(ConfigError, match=r"the validation rows: 3 of 3 rows have a reference without a number"):
        train("sft", "evaluation=gsm8k", f"data.val={russian}", name="numbers")


def test_an_expression_that_leaves_nothing_of_the_references_is_told_before_training(
    train: Train, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "set.jsonl", [row("a", "<think>yes</think>"), row("b", "<think>x</think> no")])
    with pytest.raises(ConfigError, match=r"evaluation set mine: of 1 of 2 rows evaluation.strip leaves nothing .*0\)"):
        train("sft", "evaluation=default", f"evaluation.sets={{mine: {path}}}")


def test_the_words_of_rouge_are_recorded_and_answers_scored_by_others_are_scored_anew(
    train: Train, tmp_path: Path
) -> None:
    texts = write_rows(tmp_path / "set.jsonl", [row("Repeat 1", "red Москва")])
    options = ("sft", "evaluation=minillm", f"evaluation.sets={{mine: {texts}}}", "evaluation.seeds=[10]")
    options += ("data.template=alpaca", "evaluation.max_prompt_length=90", "trainer.max_steps=1")
    run = train(*options, "evaluation.rouge_tokenizer=unicode")
    record = run.read_summary()["meta"]["evaluation"]
    assert record["rouge_tokenizer"] == "unicode"
    assert "rouge_tokenizer is unicode instead of default" in record["deviations"]
    assert "letters and digits of all scripts" in record["scorers"]["rouge"]
    # MiniLLM's scripts strip nothing.
    assert record["strip"] is None
    assert "strip" not in " ".join(record["deviations"])
    (scored,) = read_json_lines(run.generations / "mine_seed10.jsonl") or [{}]
    assert scored["protocol"]["rouge_tokenizer"] == "unicode"
    # The same answer under the words of published numbers; the run's files stay.
    run_evaluation([f"run={run.path}", "evaluation.rouge_tokenizer=default", f"run_dir={run.path / 'again'}"])
    (again,) = read_json_lines(run.path / "again" / "generations" / "mine_seed10.jsonl") or [{}]
    assert again["output"] == scored["output"]
    assert "rouge_tokenizer" not in again["protocol"]
