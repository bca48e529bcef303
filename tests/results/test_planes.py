"""Heat maps of two settings against a score."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deltakd.config.loss_names import known_losses
from deltakd.report import main
from deltakd.results.methods import Method, make_methods
from deltakd.results.planes import PlaneRequest, find_planes, less_is_better, plane_plate
from deltakd.results.reading import find_runs
from tests.results.fake import Config, write_run


def write_point(folder: Path, w: float, v: float, seed: int, kl: float, *, rows: int = 300, stage: str = "few") -> None:
    name = f"delta_weight={w},loss.target.v={v},seed={seed}"

    def change(config: Config) -> None:
        config["loss"]["target"]["v"] = v
        config["data"]["limit"] = rows
        config["name"] = f"plane/{stage}/{name}"

    path = folder / stage / name
    write_run(path, "delta_bilinear", seed, weight=w, change=change, summary={"val/kl_teacher": kl})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for w in (0.0, 0.5, 1.0):
        for v in (1.0, 1.5):
            for seed in (1, 2):
                if (w, v) != (1.0, 1.5):
                    write_point(tmp_path / "plane", w, v, seed, 1.0 + w - v / 10 + 0.2 * seed)
    for w in (0.0, 1.0):
        for v in (1.0, 1.5):
            write_point(tmp_path / "plane", w, v, 1, 3.0, rows=2400, stage="many")
    write_run(tmp_path / "plane" / "kd", "kd")
    return tmp_path / "plane"


def methods_of(folder: Path) -> list[Method]:
    return make_methods(find_runs([str(folder)]).runs, known_losses(), [])


def test_seeds_are_averaged_and_other_settings_have_maps_of_their_own(folder: Path) -> None:
    few, many = find_planes(methods_of(folder), PlaneRequest(scores=("val/kl_teacher",)))
    assert (few.name, many.name) == ("few", "many")
    assert (few.columns, few.rows) == (many.columns, many.rows) == ([0.0, 0.5, 1.0], [1.0, 1.5])
    assert few.cells[0.5, 1.0].mean == pytest.approx(1.4 + 0.3)
    assert few.cells[0.5, 1.0].stderr == pytest.approx(0.1)
    assert (few.cells[0.5, 1.0].seeds, many.cells[0.0, 1.0].seeds) == (2, 1)
    assert few.best == (0.0, 1.5)
    assert few.table.lines[1] == ["1.5", "1.15 ± 0.100 (2 seeds)", "1.65 ± 0.100 (2 seeds)", "not run"]
    assert many.table.lines[0][2] == "not run"
    assert less_is_better("val/kl_teacher")
    assert not less_is_better("val/rougeL")


def test_without_stages_maps_are_named_by_what_differs(folder: Path) -> None:
    """Keys that copy a knob, as loss.target.delta_weight does, split no map."""
    runs = find_runs([str(folder)]).runs
    for run in runs:
        run.config["name"] = "run"  # type: ignore[index]
    planes = find_planes(make_methods(runs, known_losses(), []), PlaneRequest(scores=("val/kl_teacher",)))
    assert [plane.name for plane in planes] == ["data.limit=300", "data.limit=2400"]
    swapped = find_planes(make_methods(runs, known_losses(), []), PlaneRequest("data.limit", "delta_weight"))
    assert {plane.name for plane in swapped} == {"target.v=1.0", "target.v=1.5"}


def test_the_figure_says_what_is_empty_and_has_its_numbers_as_text(folder: Path) -> None:
    first, *_ = plane_plate(methods_of(folder), PlaneRequest(scores=("val/kl_teacher",))).panels
    svg = first.svg
    assert svg.count(">not run<") == 1
    assert len(re.findall(r"var\(--series-1\)", svg)) >= 5
    for text in (">delta_weight<", ">loss.target.v<", ">1.15<", "± 0.100"):
        assert text in svg
    assert first.table is not None


def test_a_heat_map_stands_alone_in_both_themes(folder: Path, tmp_path: Path) -> None:
    first, *_ = plane_plate(methods_of(folder), PlaneRequest(scores=("val/kl_teacher",))).panels
    root = ElementTree.parse(first.write_svg(tmp_path)).getroot()
    style = root[0].text or ""
    assert root[0].tag.endswith("style")
    assert "prefers-color-scheme:dark" in style
    used = set(re.findall(r"var\((--[\w-]+)\)", first.svg))
    assert used
    assert all(style.count(f"{name}:") == 2 for name in used)


@pytest.mark.slow
def test_a_report_draws_the_plane_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(folder), "--preservation", "off", "--output", str(folder / "out")]
    main([*given, "--plane", "delta_weight", "loss.target.v", "val/kl_teacher"])
    page, text = ((folder / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert page.count("<summary>As a table</summary>") == 2
    assert "### val/kl\\_teacher: few" in text
    assert "not run" in text
    assert sorted(path.name for path in (folder / "out" / "figures").glob("plane_*.pdf")) == [
        "plane_1_val_kl_teacher_few.pdf", "plane_2_val_kl_teacher_many.pdf"
    ]  # fmt: skip
    main([*given, "--plane", "delta_weight", "optim.lr"])
    assert "--plane delta_weight optim.lr: no finished methods have two values" in (
        (folder / "out" / "report.html").read_text()
    )
    with pytest.raises(SystemExit):
        main([*given, "--plane", "delta_weight"])
    assert "--plane needs two config keys" in capsys.readouterr().err
