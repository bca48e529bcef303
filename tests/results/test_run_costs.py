"""The table of costs: on- and off-policy runs in the same columns."""

from __future__ import annotations

import json
from pathlib import Path

from deltakd.config.compose import CONF_DIR
from deltakd.config.loss_names import read_losses
from deltakd.results.formats import cost_markdown
from deltakd.results.methods import make_methods
from deltakd.results.reading import find_runs
from deltakd.results.run_costs import CostTable, cost_table
from tests.results.fake import write_run


def set_meta(run: Path, **changes: object) -> None:
    """Change the ``meta`` of a run's summary."""
    file = run / "summary.json"
    summary = json.loads(file.read_text())
    summary["meta"] |= changes
    file.write_text(json.dumps(summary))


def table_of(folder: Path) -> CostTable:
    return cost_table(make_methods(find_runs([str(folder)]).runs, read_losses(CONF_DIR / "loss"), []))


def test_off_policy_runs_alone_have_no_columns_about_writing(tmp_path: Path) -> None:
    write_run(tmp_path / "sft", "sft")
    set_meta(tmp_path / "sft", rollouts=None)
    table = table_of(tmp_path)
    assert not {"writing (s)", "both (s)", "sampled tokens"} & set(table.columns)
    assert "Writing" not in cost_markdown(table)


def test_time_and_tokens_of_on_policy_runs_stand_beside_those_of_off_policy_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "sft", "sft")
    set_meta(tmp_path / "sft", rollouts=None)
    for seed, (seconds, tokens) in enumerate([(4.0, 3000), (6.0, 5000)]):
        write_run(tmp_path / f"kd{seed}", "kd", seed)
        set_meta(tmp_path / f"kd{seed}", rollouts={"seconds": seconds, "tokens": tokens})
    table = table_of(tmp_path)
    cells = {row.label: dict(zip(table.columns, row.cells, strict=True)) for row in table.rows}
    assert [row.runs for row in table.rows] == [2, 1]
    wanted = ("training (s)", "writing (s)", "both (s)", "sampled tokens", "trained tokens")
    assert [cells["kd"][name] for name in wanted] == ["10.0", "5.0", "15.0", "4,000", "5,000"]
    assert [cells["sft"][name] for name in wanted] == ["10.0", "0.0", "10.0", "0", "5,000"]
    text = cost_markdown(table)
    assert "| kd | 2 | 1,000 | 100 | 10.0 | 5.0 | 15.0 | 4,000 | 12.0 | 40 | 5,000 |" in text.splitlines()


def test_what_a_summary_does_not_say_is_a_dash(tmp_path: Path) -> None:
    write_run(tmp_path / "kd", "kd")
    set_meta(tmp_path / "kd", rollouts={"seconds": 1.0, "tokens": 5}, training_seconds=None)
    (row,) = table_of(tmp_path).rows
    shown = dict(zip(table_of(tmp_path).columns, row.cells, strict=True))
    assert shown["training (s)"] == shown["both (s)"] == "–"
    assert shown["writing (s)"] == "1.0"
