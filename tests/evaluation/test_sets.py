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
