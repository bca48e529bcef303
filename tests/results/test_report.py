"""``python -m deltakd.report``: from trained runs to files, and what it says of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deltakd.io.run_directory import RunDirectory
from deltakd.report import default_output, main, tidy
from tests.results.fake import write_run
from tests.tiny import World


def test_real_runs_become_a_report(
    world: World,
    train: Callable[..., RunDirectory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ("evaluation.generate=true", f"evaluation.sets={{mine: {world.root / 'test.jsonl'}}}")
    for name, loss in (("a", "kd"), ("b", "delta_kd")):
        train(loss, *sets, "trainer.max_steps=2", f"run_dir={tmp_path / 'runs' / name}", name=f"runs/{name}")
    (write_run(tmp_path / "runs" / "c") / "summary.json").write_text("{")
    main(["runs", "--preservation", "3", "--baseline", "delta_kd"])
    page = (tmp_path / "runs" / "report" / "report.html").read_text(encoding="utf-8")
    assert "| delta\\_kd |" in capsys.readouterr().out
    assert str(tmp_path) not in page
    assert '<section id="tokens">' in page
    stored = json.loads((tmp_path / "runs" / "a" / "preservation.json").read_text(encoding="utf-8"))
    assert f"{stored['overall']['measures']['kl_teacher']['mean']:.4f}" in page
    assert "runs/a_again" in page
    assert "runs/c/summary.json can&#39;t be read" in page


def test_bad_input_ends_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    for arguments, said in (
        ([str(tmp_path / "nothing")], "nothing does not exist; wanted: a run directory"),
        ([str(tmp_path), "--baseline", "tsf", "--preservation", "off"], "the nearest one is 'sft'"),
        ([str(tmp_path), "--preservation", "0"], "'0' is neither a number of rows ≥ 1 nor off"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_what_is_private_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere/me")
    monkeypatch.chdir(tmp_path)
    assert tidy(f"{tmp_path}/runs/a and /somewhere/me/b") == "runs/a and ~/b"


def test_a_report_goes_beside_what_it_reports_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [Path("outputs/study/kd"), Path("outputs/study/sft")]
    study = tmp_path / "experiments" / "study"
    study.mkdir(parents=True)
    (study / "study.yaml").touch()
    for given, expected in (
        (["outputs/study"], "outputs/study/report"),
        (["outputs"], "outputs/report"),
        (["experiments/study"], "outputs/study/report"),
        # Of some of its runs, the report does not take the place of the whole folder's.
        (["outputs/study/kd", "outputs/study/sft"], "outputs/study/report_kd_sft"),
        (["outputs/study/[ks]*"], "outputs/study/report_ks"),
    ):
        assert default_output(given, runs) == Path(expected)
    assert default_output(["outputs/study/kd"], runs[:1]) == Path("outputs/study/report_kd")
    assert default_output([str(tmp_path / "outputs")], runs) == Path("outputs/report")
