"""The comparison table: what is bold, what is compared, and which runs share a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltakd.config.compose import CONF_DIR
from deltakd.config.loss_names import read_losses
from deltakd.evaluation.scoring import THINK_BLOCKS
from deltakd.results.formats import latex, markdown
from deltakd.results.methods import make_methods
from deltakd.results.reading import find_runs
from deltakd.results.tables import Comparison, make_comparisons
from tests.results.fake import write_run

GREEDY = {"decoding": {"do_sample": False, "temperature": 1.0, "max_new_tokens": 64, "seed": 10, "eos_ids": [0]}}


def tables_of(folder: Path, baseline: str | None = None, mixed: bool = False) -> list[Comparison]:
    methods = make_methods(find_runs([str(folder)]).runs, read_losses(CONF_DIR / "loss"), [])
    return make_comparisons(methods, baseline, mixed)


def test_the_best_is_bold_only_where_it_is_separated_from_all_others(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path / "clear" / f"sft{seed}", "sft", seed, level=20 + seed / 10)
        write_run(tmp_path / "clear" / f"kd{seed}", "kd", seed, level=20.1 + seed / 10)
        write_run(tmp_path / "clear" / f"delta{seed}", "delta_kd", seed, level=25 + seed / 10)
        write_run(tmp_path / "unclear" / f"sft{seed}", "sft", seed, level=20 + seed)
        write_run(tmp_path / "unclear" / f"kd{seed}", "kd", seed, level=20.3 + (4 - seed))
    clear, unclear = tables_of(tmp_path / "clear")[0], tables_of(tmp_path / "unclear")[0]
    assert {row.label: row.scores["test"].best for row in clear.rows} == {"delta_kd": True, "kd": False, "sft": False}
    assert not any(row.scores["test"].best for row in unclear.rows)
    assert clear.baseline == "sft"
    by_label = {row.label: row.scores["test"] for row in clear.rows}
    assert by_label["sft"].difference is None
    difference = by_label["delta_kd"].difference
    assert difference is not None
    assert difference.low > 0
    # Mean and error by hand: of three runs' means, each an average over prompts.
    means = [
        np.mean([r["rougeL"] for r in run.answers["test"][10]])
        for run in find_runs([str(tmp_path / "clear" / "kd*")]).runs
    ]
    assert by_label["kd"].spread.mean == pytest.approx(np.mean(means))
    assert by_label["kd"].spread.stderr == pytest.approx(np.std(means, ddof=1) / np.sqrt(3))
    text, tex = markdown([clear, unclear]), latex([clear, unclear])
    assert text.count("**") == 2
    assert "over training seeds, after averaging over sampling seeds." in text
    assert "Nothing is bold" in text
    assert tex.count(r"\boldsymbol") == 1
    assert r"delta\_kd" in tex


def test_one_seed_is_said_to_be_one(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "sft")
    write_run(tmp_path / "b", "kd")
    notes = " ".join(tables_of(tmp_path)[0].notes)
    assert "over prompts, since there is one training seed" in notes
    assert "a 95 % t-interval over prompts in brackets" in notes
    assert "the variance between training runs is not estimated" in notes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"record": GREEDY}, "test: greedy (max_new_tokens 64) instead of sampled under seed 10"),
        ({"rows": 20}, "test: 20 prompts instead of 30 prompts"),
        ({"record": {"prompt": "Another template"}}, "test: other prompt texts (template, length limit or tokenizer)"),
        ({"record": {"protocol": {"rouge_tokenizer": "unicode"}}}, "test: rouge (unicode words) instead of rouge"),
        ({"record": {"protocol": {"strip": "a+"}}}, "test: rouge (without a+) instead of rouge"),
        ({"record": {"protocol": {"strip": THINK_BLOCKS}}}, "test: rouge (without <think> blocks) instead of rouge"),
        ({"record": {"reference": ["Other"]}}, "test: other reference answers"),
    ],
)
def test_other_protocols_have_tables_of_their_own_unless_mixed(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    write_run(tmp_path / "a", "sft")
    write_run(tmp_path / "b", "kd")
    write_run(tmp_path / "c", "delta_kd", level=50, **settings)
    tables = tables_of(tmp_path)
    assert [[row.label for row in table.rows] for table in tables] == [["sft", "kd"], ["delta_kd"]]
    assert [table.title for table in tables] == ["ROUGE-L (%), protocol 1", "ROUGE-L (%), protocol 2"]
    (mixed,) = tables_of(tmp_path, mixed=True)
    assert [row.label for row in mixed.rows] == ["sft [1]", "kd [1]", "delta_kd [2]"]
    assert any(said in sentence for sentence in mixed.protocol)
    assert not any(row.scores["test"].best for row in mixed.rows)
    # Other prompts can't be paired.
    assert (mixed.rows[2].scores["test"].difference is None) == ("rows" in settings)


def test_a_set_under_two_scorers_is_in_both_tables_of_a_mixed_report(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "sft")
    file = write_run(tmp_path / "b", "kd") / "generations" / "test_seed10.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        del record["rougeL"], record["exact_match"]
        record |= {"final_number": 50.0, "final_number_lenient": 0.0}
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    tables = tables_of(tmp_path, mixed=True)
    shown = {table.metric: {row.label: list(row.scores) for row in table.rows} for table in tables}
    assert shown["rougeL"] == {"sft [1]": ["test"], "kd [2]": []}
    assert shown["final_number"] == {"sft [1]": [], "kd [2]": ["test"]}


def test_the_spread_over_sampling_seeds_is_said(tmp_path: Path) -> None:
    for seed, shift in ((1, 2.0), (2, 4.0)):
        run = write_run(
            tmp_path / f"sft{seed}", "sft", seed, change=lambda config: config["evaluation"].update(seeds=[10, 20])
        )
        first = run / "generations" / "test_seed10.jsonl"
        records = [json.loads(line) for line in first.read_text().splitlines()]
        others = [record | {"rougeL": record["rougeL"] + shift} for record in records]
        (run / "generations" / "test_seed20.jsonl").write_text("".join(json.dumps(r) + "\n" for r in others))
    # Two values that are d apart have the standard deviation d / √2; the mean of d is 3.
    (table,) = tables_of(tmp_path)
    assert f"averaged over training seeds: sft: test {3 / np.sqrt(2):.2f}." in " ".join(table.notes)


def test_the_baseline_can_be_chosen_by_name(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "sft")
    write_run(tmp_path / "b", "kd")
    assert tables_of(tmp_path, "kd")[0].baseline == "kd"
    with pytest.raises(ValueError, match=r"--baseline kdd is not a method .* nearest one is 'kd'; there are: sft, kd"):
        tables_of(tmp_path, "kdd")
