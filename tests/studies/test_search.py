"""``deltakd.search``, and what a multirun says at its end."""

from __future__ import annotations

import copy
import csv
import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from deltakd.cli import guarded
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError, NonFiniteLossError, Stopped
from deltakd.studies import sweep_files
from deltakd.studies import trials as search_trials
from deltakd.studies.multirun import Job, MultirunSummary, read_outcomes, run_job
from deltakd.studies.outcome_plots import write_plot
from deltakd.studies.outcomes import FAILED, FINISHED, Outcome, find_best, incomparable
from deltakd.studies.sweep_files import read_sweep
from deltakd.studies.trials import Search, run_search
from tests.tiny import World

ROOT = Path(__file__).resolve().parents[2]
SPACE = {
    "delta_weight": {"min": 0.0, "max": 2.0},
    "optim.lr": {"distribution": "log_uniform_values", "min": 1e-3, "max": 1e-1},
    "loss": {"values": ["kd", "delta_kd"]},
}


@functools.cache
def compose_once(overrides: tuple[str, ...]) -> DictConfig:
    return compose_config("train", overrides)


def compose_quickly(name: str, overrides: list[str]) -> DictConfig:
    """Plain values that differ among trials are set in a copy."""
    plain = {"delta_weight": float, "optim.lr": float, "seed": int, "name": str, "run_dir": str, "objective": str}
    values = {key: value for key, value in (text.split("=", 1) for text in overrides) if key in plain}
    cfg = copy.deepcopy(compose_once(tuple(text for text in overrides if text.split("=", 1)[0] not in plain)))
    for key, value in values.items():
        OmegaConf.update(cfg, key, plain[key](value))
    return cfg


@pytest.fixture
def make_search(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Search]:
    # Composing and checking keys (tests/studies/test_sweeps.py) would take most of these tests' time.
    monkeypatch.setattr(search_trials, "compose_config", compose_quickly)
    monkeypatch.setattr(sweep_files, "check_overrides", lambda name, overrides: None)

    def make(train: Any = None, trials: int | None = None, folder: str = "search", **content: Any) -> Search:
        tiny = [o for o in world.overrides(tmp_path, "delta_kd") if not o.startswith("run_dir=")]
        base = {
            "method": "bayes",
            "metric": {"name": "val/ce", "goal": "minimize"},
            "command": ["${env}", "${interpreter}", "-m", "deltakd.train", *tiny, "${args_no_hyphens}"],
            "parameters": SPACE,
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(base | content))
        options = {} if train is None else {"train": train}
        return Search(read_sweep(path), tmp_path / folder / "study.db", trials, **options)

    return make


def go(search: Search) -> tuple[list[Outcome], str]:
    console = Console(file=io.StringIO(), width=300)
    outcomes = run_search(search, console)
    assert isinstance(console.file, io.StringIO)
    return outcomes, console.file.getvalue()


class FakeTraining:
    """An objective with a known best point; some of its runs end otherwise."""

    def __init__(self, **endings: Exception) -> None:
        self.endings = {int(number[1:]): error for number, error in endings.items()}
        self.started: list[int] = []

    def __call__(self, cfg: DictConfig, directory: Path) -> float:
        number = int(directory.name)
        self.started.append(number)
        assert cfg.resume is True
        assert cfg.run_dir == str(directory)
        assert cfg.objective == "val/ce"
        if error := self.endings.pop(number, None):
            raise error
        return abs(cfg.delta_weight - 1.0) + (cfg.optim.lr - 0.01) ** 2


def test_an_interrupted_search_ends_as_one_that_was_not(
    make_search: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Below ten trials Optuna's sampler draws at random; what is left of them here is chosen.
    monkeypatch.setattr(search_trials, "_STARTUP_TRIALS", 1)
    whole, _ = go(make_search(FakeTraining(), 4, "whole"))
    training = FakeTraining(t1=Stopped(15, 2), t3=Stopped(2, 1))
    for trials in (2, 4):
        with pytest.raises(Stopped):
            go(make_search(training, trials))
    parts, shown = go(make_search(training, 4))
    assert training.started == [0, 1, 1, 2, 3, 3]
    assert [o.settings for o in parts] == [o.settings for o in whole]
    assert len({o.settings["delta_weight"] for o in parts}) == 4
    best = min(parts, key=lambda o: o.value or 0.0)
    lines = shown.splitlines()
    assert f"best val/ce = {best.value:.6g}: " in shown
    # The command that trains it again has all digits.
    assert all(f"{key}={value}" in lines[-2] for key, value in best.settings.items())
    _, shown = go(make_search(training, 4))
    assert len(training.started) == 6, "finished trials are not done again"
    with (make_search().directory / "search.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [o.value for o in whole]
    assert rows[0]["optim.lr"] == whole[0].settings["optim.lr"]
    assert (make_search().directory / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_a_trial_that_diverges_fails_and_the_search_goes_on(make_search: Callable[..., Search]) -> None:
    training = FakeTraining(t1=NonFiniteLossError("the loss is nan at optimiser step 1"))
    outcomes, shown = go(make_search(training, 3))
    assert [o.state for o in outcomes] == [FINISHED, FAILED, FINISHED]
    assert "[2/3] failed: the loss is nan at optimiser step 1" in shown
    assert "left)" in shown


def test_a_grid_is_gone_through_in_order_and_once(make_search: Callable[..., Search]) -> None:
    grid = {"delta_weight": {"values": [0.5, 1]}, "seed": {"values": [1, 2]}}
    training = FakeTraining()
    go(make_search(training, 1, method="grid", parameters=grid))
    outcomes, shown = go(make_search(training, method="grid", parameters=grid))
    points = [tuple(o.settings.values()) for o in outcomes]
    assert points == [("0.5", "1"), ("0.5", "2"), ("1", "1"), ("1", "2")]
    assert training.started == [0, 1, 2, 3]
    assert "over 2 seeds): delta_weight=1  (" in shown


def test_what_can_not_be_searched_is_refused_before_anything_starts(make_search: Callable[..., Search]) -> None:
    training = FakeTraining()
    with pytest.raises(ConfigError, match=r"objective is val/rougeL, but this run generates no answers"):
        go(make_search(training, metric={"name": "val/rougeL", "goal": "maximize"}))
    with pytest.raises(ConfigError, match=r"metric\.goal is maximize, but of val/ce more is worse"):
        go(make_search(training, metric={"name": "val/ce", "goal": "maximize"}))
    command = ["${env}", "${interpreter}", "-m", "deltakd.train", "${args_no_hyphens}"]
    with pytest.raises(ConfigError, match=r"model\.student\.path"):
        go(make_search(training, command=command))
    go(make_search(training, 1))
    with pytest.raises(ConfigError, match=r"holds another search: parameters\.delta_weight .*give another --storage"):
        go(make_search(training, 2, parameters=SPACE | {"delta_weight": {"min": 0.0, "max": 3.0}}))
    with search_trials._only_process(make_search()), pytest.raises(ConfigError, match="another process is searching"):
        go(make_search(training, 2))
    assert training.started == [0]


def test_a_real_search_trains_and_ends_poor_trials_early(
    make_search: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "parameters": {"optim.lr": {"values": [0.01, 0.02, 1e30]}},
        "early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2},
        "method": "grid",
    }
    steps = ["trainer.val_every_n_steps=2"]

    def make(trials: int) -> Search:
        search = make_search(trials=trials, **settings)
        return Search(read_sweep(search.sweep.path, steps), search.storage, trials)

    outcomes, _ = go(make(1))
    summary = json.loads((outcomes[0].directory / "summary.json").read_text())
    assert outcomes[0].value == summary["val/ce"]
    with (outcomes[0].directory / "metrics.csv").open() as file:
        curve = [float(row["val/ce"]) for row in csv.DictReader(file) if row["val/ce"]]
    with search_trials._opened(make(1)) as study:
        assert study.trials[0].intermediate_values == pytest.approx(dict(enumerate(curve, 1)))
        assert len(curve) == 3
    # Hyperband would need many trials to end one of them for sure.
    monkeypatch.setattr(
        search_trials, "_pruner", lambda sweep: optuna.pruners.ThresholdPruner(upper=0.0, n_warmup_steps=2)
    )
    outcomes, shown = go(make(3))
    assert [o.state for o in outcomes] == [FINISHED, "ended early", FAILED]
    assert "[2/3] ended after 2 of 3 validations" in shown
    assert not (outcomes[1].directory / "summary.json").exists()
    assert outcomes[1].value is not None
    assert "best val/ce" in shown
    assert "optim.lr=0.01" in shown.splitlines()[-3]


def outcome(number: int, value: float | None, state: str = FINISHED, **settings: str) -> Outcome:
    return Outcome(number, settings, state, "val/rougeL", value, 1.0, Path(str(number)))


def test_the_best_setting_is_the_best_mean_over_seeds() -> None:
    runs = [("kd", 20.0), ("kd", 30.0), ("sft", 24.0), ("sft", 27.0), ("taid", 99.0)]
    outcomes = [outcome(i, value, loss=loss, seed=str(i)) for i, (loss, value) in enumerate(runs)]
    outcomes.append(outcome(9, None, FAILED, loss="taid", seed="1"))
    best = find_best(outcomes, maximize=True)
    assert best is not None
    assert (best.settings, best.value, best.stderr, best.directory) == (
        {"loss": "sft"}, 25.5, pytest.approx(1.5), Path("3"),
    )  # fmt: skip
    worst = find_best(outcomes, maximize=False)
    assert worst is not None
    assert worst.settings == {"loss": "kd"}
    assert find_best([outcome(0, None, FAILED), outcome(1, float("nan"))], maximize=True) is None


def test_plots_take_numbers_names_and_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    assert not write_plot([outcome(0, None, FAILED, seed="1")], True, "none", path)
    mixed = [outcome(0, 1.0, clip="null", lr="1e-5"), outcome(1, 2.0, "ended early", clip="5", lr="0.1")]
    assert write_plot(mixed, True, "mixed", path)
    assert path.stat().st_size > 5000


def test_losses_are_not_compared_by_their_own_loss() -> None:
    assert "objective=val/ce" in (incomparable("val/loss", ["loss", "seed"]) or "")
    assert incomparable("val/loss", ["optim.lr", "seed"]) is None
    assert incomparable("val/rougeL", ["loss", "delta_weight"]) is None


def test_a_failing_job_costs_its_own_result_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train(number: int, weight: str, value: float | Exception) -> float:
        directory = tmp_path / "multirun" / str(number)

        def action() -> float:
            if isinstance(value, Exception):
                raise value
            directory.mkdir(parents=True)
            content = {"val/rougeL": value, "meta": {"objective": "val/rougeL"}}
            (directory / "summary.json").write_text(json.dumps(content))
            return value

        overrides = ["loss=delta_kd", f"delta_weight={weight}"]
        return run_job(Job(number, directory.parent, overrides, directory), lambda: guarded(action, ""))

    assert train(0, "0", 20.0) == 20.0
    assert train(1, "0.5", NonFiniteLossError("the loss is nan")) != train(1, "0.5", ValueError("bad")) != 0
    assert train(2, "1", RuntimeError("out of memory")) != 0
    assert train(3, "2", 25.0) == 25.0
    with pytest.raises(SystemExit, match="143"):
        train(4, "3", Stopped(15, 1))
    root = tmp_path / "multirun"
    states = [o.state for o in read_outcomes(root)]
    assert states == [FINISHED, FAILED, FAILED, FINISHED, "unfinished"]
    capsys.readouterr()
    config = OmegaConf.create({"run_dir": str(root)})
    with pytest.raises(SystemExit, match="2"):
        MultirunSummary().on_multirun_end(config)
    shown = capsys.readouterr()
    assert f"best val/rougeL = 25: delta_weight=2  ({root / '3'})" in shown.out
    assert "2 of 5 jobs failed: 1 (delta_weight=0.5); 2 (delta_weight=1)" in shown.err
    assert (root / "multirun.csv").is_file()
    assert (root / "multirun.png").is_file()
    MultirunSummary().on_multirun_start(config)
    assert not read_outcomes(root)


@pytest.mark.slow
def test_a_multirun_in_two_processes_and_its_resumption(world: World, tmp_path: Path) -> None:
    tiny = [o for o in world.overrides(tmp_path, "x", "optim.lr=0.01,1e30") if not o.startswith(("loss=", "run_dir="))]
    command = [
        sys.executable, "-m", "deltakd.train", "--multirun", *tiny, "hparams_search=delta_weight_grid", "loss=delta_kd",
        "objective=val/ce", "delta_weight=0,1", "run_dir=outputs/grid", "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    outputs = []
    for extra in ([], ["resume=true"]):
        done = subprocess.run([*command, *extra], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "error: 2 of 4 jobs failed: 1 (" in done.stderr
        outputs.append([line for line in done.stdout.splitlines() if line.startswith("best val/ce = ")])
    assert len(outputs[0]) == 1
    assert outputs[0] == outputs[1]
    assert len(list((tmp_path / "outputs" / "grid").glob("[0-9]/summary.json"))) == 2
