"""The list of run directories: states, filters, order, columns that fit, and what differs between two."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from deltakd.io.errors import ConfigError
from deltakd.io.progress import write_total_steps
from deltakd.results.listing import best_of, default_columns, differences, find_entries, make_table, ordered, select
from deltakd.runs import main, show_runs

DELTA_KD: dict[str, Any] = {
    "_target_": "deltakd.losses.Distillation",
    "target": {"_target_": "deltakd.losses.delta_target", "delta_weight": 1.0},
    "divergence": {"_target_": "deltakd.losses.ForwardKL"},
}


def write_run(path: Path, summary: dict[str, Any] | None = None, **changes: Any) -> Path:
    config = {
        "delta_weight": 1.0,
        "seed": 0,
        "loss": {"_target_": "deltakd.losses.SupervisedFineTuning"},
        "model": {"student": {"path": "outputs/study/pretrain/student"}},
        "optim": {"lr": 0.001},
    }
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config | changes))
    if summary is not None:
        content = summary | {"meta": {"steps": 10, "seconds": 61.4, "git_commit": "abc"}}
        (path / "summary.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    root = Path("outputs")
    write_run(root / "sft", {"val/rougeL": 20.0, "val/rougeL_stderr": 1.5})
    write_run(root / "sweep" / "2", {"val/rougeL": 40.0, "test/rougeL": 4.0}, loss=DELTA_KD, delta_weight=0.25)
    write_run(root / "sweep" / "10", {"val/rougeL": 30.0}, loss=DELTA_KD, seed=2, optim={"lr": 0.1})
    half = write_run(root / "half")
    (half / "metrics.csv").write_text("step,train/loss\n9,3\n19,2\n")
    write_total_steps(half, 50)
    (write_run(root / "torn", {}) / "summary.json").write_text('{"val/rougeL": 1,')
    (root / "half" / "checkpoints" / "x").mkdir(parents=True)
    (root / "half" / "checkpoints" / "x" / "config.yaml").write_text("a: 1")
    return root


def names(entries: Any) -> list[str]:
    return [str(e.path.relative_to("outputs")) for e in entries]


def test_runs_are_found_below_with_their_states(runs: Path) -> None:
    entries = {str(e.path.relative_to(runs)): e for e in find_entries([runs])}
    assert list(entries) == ["half", "sft", "sweep/2", "sweep/10", "torn"]
    assert entries["half"].columns["state"] == "step 19 of 50"
    assert entries["torn"].corrupt == "summary.json, line 1: Expecting property name enclosed in double quotes"
    assert entries["sweep/2"].columns["loss"] == "delta_kd"
    assert entries["sweep/2"].columns["delta_weight"] == 0.25
    # The key is in the config, but SFT does not read it.
    assert entries["sft"].columns["delta_weight"] is None
    assert entries["sft"].columns["student"] == "pretrain"


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["loss=delta_kd"], ["sweep/2", "sweep/10"]),
        (["loss!=delta_kd", "state=finished"], ["sft"]),
        (["loss=*kd", "delta_weight>0.5"], ["sweep/10"]),
        (["val/rougeL>=30"], ["sweep/2", "sweep/10"]),
        (["optim.lr=1e-1"], ["sweep/10"]),
        (["state=corrupt*"], ["torn"]),
        (["state=step*"], ["half"]),
        (["run=*sweep*", "seed<1"], ["sweep/2"]),
    ],
)
def test_filters(runs: Path, conditions: list[str], expected: list[str]) -> None:
    assert names(select(find_entries([runs]), conditions)) == expected


def test_all_wrong_filters_are_named_with_the_nearest_keys(runs: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        select(find_entries([runs]), ["delta_wieght=1", "optim.lrr=1", "seed"])
    text = str(caught.value)
    assert "the nearest one is 'delta_weight'" in text
    assert "the nearest one is 'optim.lr'" in text
    assert "'seed': give key=value" in text


def test_sorted_by_score_and_those_without_come_last(runs: Path) -> None:
    entries = find_entries([runs])
    assert names(ordered(entries, "val/rougeL", ascending=False)) == ["sweep/2", "sweep/10", "sft", "half", "torn"]
    assert names(ordered(entries, "val/rougeL", ascending=True))[:3] == ["sft", "sweep/10", "sweep/2"]
    with pytest.raises(ConfigError, match=r"--sort: no run has 'val/rogueL'; the nearest one is 'val/rougeL'"):
        ordered(entries, "val/rogueL", ascending=False)


def test_the_best_of_the_runs_that_share_a_loss(runs: Path) -> None:
    by_score = ordered(find_entries([runs]), "val/rougeL", ascending=True)
    assert names(best_of(by_score, ["loss"], "val/rougeL")) == ["sft", "sweep/10"]
    assert names(best_of(by_score, ["loss", "optim.lr"], "val/rougeL")) == ["sft", "sweep/10", "sweep/2"]


def test_columns_give_way_on_a_narrow_terminal(runs: Path) -> None:
    entries = find_entries([runs])
    for width in (60, 90, 200):
        output = io.StringIO()
        console = Console(file=output, width=width)
        console.print(make_table(entries, default_columns(entries), console))
        text = output.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert "20.00 ± 1.50" in text
        assert ("no room for" in text) == (width < 200)
    assert "test/rougeL" in text


def test_the_command_prints_the_table_and_refuses_what_is_not_there(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["outputs", "--filter", "loss=delta_kd", "--columns", "optim.lr,val/rougeL", "--sort", "val/rougeL"])
    printed = capsys.readouterr().out
    assert printed.index("outputs/sweep/2") < printed.index("outputs/sweep/10")
    assert "2 of 5 runs" in printed
    with pytest.raises(SystemExit):
        main(["nowhere"])
    assert "nowhere does not exist" in capsys.readouterr().err
    Path("empty").mkdir()
    options = argparse.Namespace(folders=[Path("empty")], filter=[], sort=None, ascending=False, columns=None)
    with pytest.raises(ConfigError, match="no run directory"):
        show_runs(options)


def test_only_what_differs_is_printed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert differences(runs / "sft", runs / "sft") == []
    main(["diff", "outputs/sweep/2", "outputs/sweep/10/config.yaml"])
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == ["delta_weight: 0.25 -> 1.0", "optim.lr: 0.001 -> 0.1", "seed: 0 -> 2"]
    (runs / "torn" / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"(?s)config.yaml is not a config.*x does not exist"):
        differences(runs / "torn", Path("x"))


def test_a_corrupt_config_is_listed(runs: Path) -> None:
    (runs / "torn" / "config.yaml").write_text("a: [")
    (entry,) = select(find_entries([runs]), ["state=corrupt*"])
    assert entry.columns["state"] == "corrupt: config.yaml is not YAML"
