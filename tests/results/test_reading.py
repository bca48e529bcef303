"""Finding and reading run directories: what is damaged is named, what is no run is passed over."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from deltakd.results.reading import find_runs
from tests.results.fake import write_run


def test_runs_of_a_folder_in_natural_order_without_what_is_no_run(tmp_path: Path) -> None:
    for number in (10, 9):
        write_run(tmp_path / str(number), seed=number)
    (tmp_path / "9" / "wandb" / "files").mkdir(parents=True)
    (tmp_path / "9" / "wandb" / "files" / "config.yaml").write_text("wandb_version: 1")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "summary.json").write_text("{}")
    write_run(tmp_path / "answers", change=lambda config: config.update(answering_teacher="abc"))
    found = find_runs([str(tmp_path), str(tmp_path / "9"), f"{tmp_path}/1*"])
    assert [run.path.name for run in found.runs] == ["9", "10"]
    assert found.skipped == []
    run = found.runs[0]
    assert (run.step, run.total_steps, run.finished) == (40, 40, True)
    assert list(run.curves["val/loss"].index) == [10, 20, 30, 40]
    assert len(run.answers["test"][10]) == 30


def test_of_a_study_its_table_is_reported_with_the_models_that_its_rows_learnt_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs") / "mine"
    for stage in ("raw", "screening/seed=0", "a", "b"):
        teacher = {"model": {"teacher": {"path": "outputs/mine/raw/student"}}}
        write_run(folder / stage, change=lambda config, it=teacher: config.update(it))
    write_run(folder / "by_hand")
    study = {"name": "mine", "stages": dict.fromkeys(["raw", "screening", "a", "b", "not_run"])}
    file = Path("experiments/mine/study.yaml")
    file.parent.mkdir(parents=True)

    def found(given: str, table: dict[str, object]) -> tuple[list[tuple[str, str | None]], list[str]]:
        file.write_text(yaml.safe_dump(study | {"table": table}, sort_keys=False))
        result = find_runs([str(tmp_path / folder / "b"), given])
        return [(run.path.name, run.label) for run in result.runs], result.skipped

    rows = {"rows": {"the second": "b", "the first": "a"}}
    shown: list[tuple[str, str | None]] = [("b", "the second"), ("a", "the first"), ("raw", None)]
    left_out = "outputs/mine: not in the table of its study.yaml, so not in this report: screening"
    for given, more in (("experiments/mine", []), ("outputs/mine", [("by_hand", None)])):
        runs, skipped = found(given, rows)
        assert runs == shown + more
        assert [sentence.partition(" (give")[0] for sentence in skipped] == [left_out]
    runs, skipped = found("experiments/mine", {})
    assert (sorted(name for name, _ in runs), skipped) == (["a", "b", "raw", "seed=0"], [])


def test_an_unfinished_run_is_read_so_far(tmp_path: Path) -> None:
    run = find_runs([str(write_run(tmp_path / "half", finished=False))]).runs[0]
    assert (run.finished, run.step, run.total_steps) == (False, 12, 40)
    assert run.answers == {}


@pytest.mark.parametrize(
    ("file", "content", "consequence"),
    [
        ("summary.json", "{", "this run is left out"),
        ("summary.json", "[1]", "holds no results of a run"),
        ("config.yaml", "a: [", "this run is left out"),
        ("metrics.csv", "step,train/loss\n1,abc\n", r"not all numbers\): its curves are left out"),
        ("metrics.csv", "", "its curves are left out"),
        ("generations/test_seed10.jsonl", '{"row_id": 1}\n', "line 1 is not a scored answer"),
        ("generations/test_seed10.jsonl", "{\n", "its scores on test are left out"),
        ("generations/test_seed10.jsonl", None, "is missing: its scores on test are left out"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str | None, consequence: str) -> None:
    write_run(tmp_path / "good", seed=1)
    damaged = write_run(tmp_path / "bad") / file
    if content is None:
        damaged.unlink()
    else:
        damaged.write_text(content)
    found = find_runs([str(tmp_path)])
    assert len(found.skipped) == 1
    assert str(damaged) in found.skipped[0]
    assert re.search(consequence, found.skipped[0])
    by_name = {run.path.name: run for run in found.runs}
    assert len(by_name["good"].answers) == 1
    if file in ("config.yaml", "summary.json"):
        assert "bad" not in by_name
    else:
        assert bool(by_name["bad"].curves) == (file != "metrics.csv")
        assert bool(by_name["bad"].answers) == (file == "metrics.csv")


def test_nothing_found_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"(?s)empty holds no run; wanted: a run directory.*nowhere does not exist"):
        find_runs([str(tmp_path / "empty"), str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match=r"x\* matches nothing"):
        find_runs([str(tmp_path / "x*")])
    (write_run(tmp_path / "run") / "summary.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"(?s)none is a run that can be reported\n  - .*summary.json can't be read"):
        find_runs([str(tmp_path)])
