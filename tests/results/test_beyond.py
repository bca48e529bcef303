"""The table of measures beyond ROUGE."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deltakd.config.compose import CONF_DIR
from deltakd.config.loss_names import read_losses
from deltakd.results.beyond import BeyondTable, beyond_tables
from deltakd.results.formats import beyond_markdown
from deltakd.results.methods import make_methods
from deltakd.results.page import make_page, render
from deltakd.results.reading import find_runs
from deltakd.results.tables import make_comparisons
from tests.results.fake import write_run


def add(run: Path, **measures: float) -> None:
    file = run / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {k.replace("__", "/"): v for k, v in measures.items()}))


def row_of(table: BeyondTable, label: str) -> dict[str, tuple[str, str]]:
    (row,) = (row for row in table.rows if row.label == label)
    return dict(zip(table.columns, row.cells, strict=True))


def test_measures_are_tabled_for_each_set(tmp_path: Path) -> None:
    for seed, value in ((1, 10.0), (2, 12.0), (3, 17.0)):
        run = write_run(tmp_path / f"kd{seed}", "kd", seed)
        add(run, val__perplexity=value, val__kl_teacher=value / 100, val__shift_correlation=-0.5)
    add(write_run(tmp_path / "sft", "sft"), val__perplexity=1234.5, test__ece=3.0, test__distinct_1=7.0)
    methods = make_methods(find_runs([str(tmp_path)]).runs, read_losses(CONF_DIR / "loss"), [])
    val, test = beyond_tables(methods)
    assert (val.name, test.name) == ("val", "test")
    assert val.columns == ["perplexity", "KL to teacher (nats)", "shift correlation"]
    error = np.std([10, 12, 17], ddof=1) / np.sqrt(3)
    assert row_of(val, "kd")["perplexity"] == ("13.00", f"{error:.2f}")
    assert row_of(val, "kd")["shift correlation"] == ("−0.500", "0.000")
    assert row_of(val, "sft") == {
        "perplexity": ("1,234.50", ""), "KL to teacher (nats)": ("–", ""), "shift correlation": ("–", "")
    }  # fmt: skip
    # "Said 7" of runs that did not write it down: from the answers; 31 different words of 60.
    assert row_of(test, "kd")["distinct-1 (%)"][0] == f"{100 * 31 / 60:.2f}"
    assert row_of(test, "kd")["length ratio"][0] == "1.00"
    assert row_of(test, "sft")["distinct-1 (%)"] == ("7.00", "")
    assert "### held-out rows (val)" in beyond_markdown([val, test])
    assert beyond_markdown([]) == ""
    page = render(make_page("title", methods, make_comparisons(methods, None, mixed=False), {}, [], "command"))
    assert '<section id="beyond"><h2>Beyond ROUGE</h2>' in page
    assert f'13.00 <span class="error">± {error:.2f}</span>' in page
    assert page.count("1,234.50") == 1


def test_unequal_amounts_are_said(tmp_path: Path) -> None:
    for name, loss, rows in (("a", "sft", 8), ("b", "kd", 8), ("c", "delta_kd", 1024)):
        file = write_run(tmp_path / name, loss) / "summary.json"
        summary = json.loads(file.read_text()) | {"val/perplexity": 9.0, "train/perplexity": 9.0}
        summary["meta"]["measured"] = {"val": {"rows": rows, "tokens": 90}, "train": {"rows": 8, "tokens": 90}}
        file.write_text(json.dumps(summary))
    methods = make_methods(find_runs([str(tmp_path)]).runs, read_losses(CONF_DIR / "loss"), [])
    notes = {table.name: table.note for table in beyond_tables(methods)}
    assert notes["train"] == ""
    assert "sft, kd on 8 rows, 90 tokens; delta_kd on 1,024 rows, 90 tokens." in notes["val"]
    assert "1,024 rows, 90 tokens." in beyond_markdown(beyond_tables(methods))


@pytest.mark.parametrize("finished", [True, False])
def test_no_measures_no_section(tmp_path: Path, finished: bool) -> None:
    run = write_run(tmp_path / "a", "sft", finished=finished)
    if finished:
        (run / "generations" / "test_seed10.jsonl").unlink()
    methods = make_methods(find_runs([str(tmp_path)]).runs, read_losses(CONF_DIR / "loss"), [])
    assert beyond_tables(methods) == []
