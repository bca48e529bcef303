"""Figures: what is drawn from which numbers, and SVG that a page can take in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deltakd.config.compose import CONF_DIR
from deltakd.config.loss_names import read_losses
from deltakd.evaluation.token_groups import Estimate, Group
from deltakd.results import figures
from deltakd.results.delta_weights import delta_weights
from deltakd.results.drawing import SERIES, Panel, styles
from deltakd.results.methods import make_methods
from deltakd.results.reading import find_runs
from deltakd.results.tables import make_comparisons
from tests.results.fake import Config, write_run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    for seed in (1, 2):
        write_run(folder / f"sft{seed}", "sft", seed)
        for weight in (0.5, 1.0):
            write_run(folder / f"delta{weight}_{seed}", "delta_kd", seed, weight=weight, level=20 + weight)
    write_run(folder / "half", "kd", finished=False)
    return folder


def panels_of(world: Path) -> dict[str, Panel]:
    methods = make_methods(find_runs([str(world)]).runs, read_losses(CONF_DIR / "loss"), [])
    tables = make_comparisons(methods, None, mixed=False)
    style = styles([method.label for method in methods])
    plates = [
        figures.learning_curves(methods, style),
        figures.loss_parts(methods, style),
        figures.differences(tables, style),
        delta_weights(tables, methods, style),
    ]
    return {panel.name: panel for plate in plates for panel in plate.panels}


def test_every_run_has_a_line_and_the_delta_weight_its_scores(world: Path) -> None:
    panels = panels_of(world)
    assert list(panels) == [
        "train_loss",
        "val_loss",
        "val_rougeL",
        "train_ce",
        "difference_rougeL_test_1",
        "delta_weight_rougeL_test_1",
    ]
    axes = Figure().add_subplot()
    panels["val_rougeL"].draw(axes)
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 1]
    # Six finished runs; the unfinished one has validated once.
    assert len(lines) == 6
    assert list(lines[0].get_xdata()) == [10, 20, 30, 40]
    assert list(lines[0].get_ydata()) == [2.5, 5.0, 7.5, 10.0]
    axes = Figure().add_subplot()
    panels["delta_weight_rougeL_test_1"].draw(axes)
    (points,) = axes.containers
    assert list(points[0].get_xdata()) == [0.5, 1.0]
    assert points[0].get_ydata()[1] - points[0].get_ydata()[0] == pytest.approx(0.5, abs=0.5)


def test_a_line_of_weights_holds_both_of_its_ends_whatever_their_stages_are_called(tmp_path: Path) -> None:
    def stage(name: str, loss: str, weight: float, level: float, lr: float = 0.001) -> None:
        def change(config: Config) -> None:
            config["name"] = f"study/{name}"
            config["optim"]["lr"] = lr

        run = write_run(tmp_path / name, loss, weight=weight, level=level, change=change)
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"val/kl_teacher": level / 100}))

    stage("final_kd", "kd", 1.0, 20.0)
    stage("final_kd_fast", "kd", 1.0, 40.0, lr=0.1)
    stage("final_delta_kd", "delta_kd", 1.0, 24.0)
    stage("alpha/delta_weight=0.25", "delta_kd", 0.25, 21.0)
    stage("alpha/delta_weight=0.5", "delta_kd", 0.5, 22.0)
    panels = {name: panel for name, panel in panels_of(tmp_path).items() if name.startswith("delta_weight")}
    assert list(panels) == ["delta_weight_rougeL_test_1", "delta_weight_kl_teacher_val"]
    axes = Figure().add_subplot()
    panels["delta_weight_kl_teacher_val"].draw(axes)
    (line,) = axes.containers
    assert line.get_label() == "delta_kd"
    # At 0 the kd with the same learning rate.
    assert list(line[0].get_xdata()) == [0.0, 0.25, 0.5, 1.0]
    assert list(line[0].get_ydata()) == pytest.approx([0.2, 0.21, 0.22, 0.24])


def test_svg_is_well_formed_and_leaves_colours_and_ids_to_the_page(world: Path, tmp_path: Path) -> None:
    panels = panels_of(world)
    texts = {name: panel.svg for name, panel in panels.items()}
    for name, text in texts.items():
        ElementTree.fromstring(text)
        assert "<style" not in text
        assert not [color for color, _ in SERIES if color in text]
        assert "var(--series-1)" in text or "var(--series-2)" in text
        assert all(found.startswith(f"{name}-") for found in re.findall(r'\bid="([^"]*)"', text))
        assert all(found.startswith(f"{name}-") for found in re.findall(r"url\(#([^)]*)\)", text))
    assert panels_of(world)["val_loss"].svg == texts["val_loss"]
    assert panels["val_loss"].write_pdf(tmp_path).read_bytes().startswith(b"%PDF")


def test_text_of_a_label_is_text(tmp_path: Path) -> None:
    panel = Panel("x", 'a "<b>" & $c', lambda axes: axes.set_xlabel("<script>x</script> $\\frac$"))
    text = panel.svg
    assert "<script" not in text
    (label,) = [e.text for e in ElementTree.fromstring(text).iter() if e.text and "script" in e.text]
    assert label == "<script>x</script> $\\frac$"


def test_errors_are_over_seeds_where_there_are_several() -> None:
    def group(mean: float | None, stderr: float = 0.25) -> dict[str, Group]:
        return {"0": Group(5, 2, 0, {"correlation": Estimate(mean, stderr)})}

    assert figures.mean_and_error([group(0.5)], "0", "correlation") == (0.5, 0.25)
    assert figures.mean_and_error([group(0.5), group(0.7), group(None)], "0", "correlation") == pytest.approx(
        (0.6, 0.1)
    )
    # The error of the run that has the mean, not of the first.
    assert figures.mean_and_error([group(None, 0.9), group(0.5)], "0", "correlation") == (0.5, 0.25)
    assert str(figures.mean_and_error([group(None)], "0", "correlation")) == "(nan, nan)"
    assert str(figures.mean_and_error([group(0.5)], "1", "correlation")) == "(nan, nan)"


def test_long_and_many_names_leave_the_axes_their_room() -> None:
    """Matplotlib would shrink the axes to nothing, and warn."""
    names = [f"arithmetic_converged_few_gated delta_weight=0.{i} loss.target.v=0.75" for i in range(30)]

    def draw(axes: Axes) -> None:
        for name in names:
            axes.plot([0, 1], [0, 1], label=name)

    figure = Panel("many", "Many", draw)._figure(legend=True)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width
    assert figure.axes[0].get_window_extent().height >= 1.2 * figure.dpi
    assert {text.get_text().replace("\n", " ") for text in legend.get_texts()} == set(names)
