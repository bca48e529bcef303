"""The files in sweeps/: valid for W&B and for us, read as distributions, and run by a real agent."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.search import main
from deltakd.studies.sweep_files import Choices, Hyperband, Interval, read_sweep, wandb_schema
from deltakd.studies.sweep_types import check_types
from deltakd.studies.sweep_values import text_problem
from deltakd.studies.trials import suggest
from tests.tiny import World
from tests.tracking import wandb_server

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
COMMAND = ["${env}", "${interpreter}", "-m", "deltakd.train", "${args_no_hyphens}"]


def write(path: Path, **content: Any) -> Path:
    base = {"method": "random", "command": COMMAND, "metric": {"name": "val/rougeL", "goal": "maximize"}}
    path.write_text(yaml.safe_dump(base | content))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_sweep_file_opens_with_its_commands_and_has_keys_of_ours(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == f"# wandb sweep sweeps/{path.name}"
    assert lines[1].startswith("# wandb agent ")
    sweep = read_sweep(path)
    assert (sweep.metric, sweep.goal) == ("val/rougeL", "maximize")
    cache = next(o for o in sweep.overrides if o.startswith("reference.path="))
    assert any(cache in line for line in lines if line.startswith("#   python -m deltakd.cache"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_sweep_file_is_valid_for_wandb(path: Path) -> None:
    schema = wandb_schema()
    if schema is None:
        pytest.skip("the package `sweeps`, which holds W&B's schema, is not installed")
    content = yaml.safe_load(path.read_text())
    content.pop("run_cap", None)
    assert [error.message for error in schema.iter_errors(content)] == []


def test_distributions(tmp_path: Path) -> None:
    parameters = {
        "delta_weight": {"distribution": "uniform", "min": 0, "max": 2},
        "optim.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
        "optim.weight_decay": {"distribution": "q_uniform", "min": 0.0, "max": 0.25, "q": 0.1},
        "trainer.max_steps": {"min": 2, "max": 5},
        "loss.ce_weight": {"min": 0.0, "max": 1.0},
        "loss": {"values": ["kd", "delta_kd"]},
        "seed": {"value": 3},
    }
    early = {"type": "hyperband", "max_iter": 27, "s": 2, "eta": 3}
    sweep = read_sweep(write(tmp_path / "s.yaml", parameters=parameters, early_terminate=early), ["loss.temperature=2"])
    assert sweep.parameters == {
        "delta_weight": Interval(0, 2),
        "optim.lr": Interval(1e-5, 1e-2, log=True),
        "optim.weight_decay": Interval(0.0, 0.2, step=0.1),
        "trainer.max_steps": Interval(2, 5, step=1, integer=True),
        "loss.ce_weight": Interval(0.0, 1.0),
        "loss": Choices(("kd", "delta_kd")),
    }
    assert sweep.overrides == ("loss.temperature=2", "seed=3")
    assert sweep.hyperband == Hyperband(3, 27, 3)
    grid = {"seed": {"values": [1, 2]}, "trainer.max_steps": {"min": 2, "max": 4}}
    points = read_sweep(write(tmp_path / "g.yaml", method="grid", parameters=grid)).grid()
    assert [tuple(p.values()) for p in points] == [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4)]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    parameters = {
        "delta_wieght": {"min": 0.0, "max": 1.0},
        "optim.learning_rate": {"values": [0.1]},
        "loss": {"values": ["kd", "delta_kdd"]},
        "seed": {"values": [None]},
        "optim.lr": {"distribution": "normal", "min": 0, "max": 1},
    }
    command = [*COMMAND[:-2], "--fast", "data.trian=x.jsonl", "${args}"]
    path = write(tmp_path / "s.yaml", method="best", parameters=parameters, command=command, metric={"goal": "up"})
    with pytest.raises(ConfigError) as caught:
        read_sweep(path)
    text = str(caught.value)
    for part in (
        "no config key 'delta_wieght'; the nearest one is 'delta_weight'",
        "no config key 'optim.learning_rate'",
        "loss=delta_kdd does not exist; the nearest is 'delta_kd'",
        "no config key 'data.trian'; the nearest one is 'data.train'",
        "parameters.seed: None can't become an override; write it as Hydra reads it, in quotes: 'null'",
        "distribution 'normal' is not known here",
        "method is 'best'; allowed: grid, random, bayes",
        "command holds '--fast'",
        "command lacks ${args_no_hyphens}",
        "metric is missing",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b", "'a,b' is several values to Hydra; list them one by one, or to give this text, quote it"),
        ("true", "the text 'true' would become true; write true without quotes, or"),
        ("2026_11", "the text '2026_11' would become 202611; write 202611 without quotes, or to give this text, quote"),
        ("7", "the text '7' would become 7; write 7 without quotes, or"),
        ("0.5", "the text '0.5' would become 0.5; write 0.5 without quotes"),
        (" a", "the text ' a' would become 'a'"),
        ("a(", "'a(' can't become an override"),
        ("range(1,3)", "'range(1,3)' is several values to Hydra"),
        ("null", None),
        ("no", None),
        ("1e-5", None),
        ("[a,b]", None),
        ("{a: 1}", None),
        ("a/b.jsonl", None),
    ],
)
def test_a_text_that_hydra_would_read_as_something_else_is_refused(text: str, said: str | None) -> None:
    problem = text_problem(text)
    assert problem is None if said is None else said in str(problem), problem
    if problem is not None:
        remedy = yaml.safe_load(problem[problem.index("to give this text, quote it: ") + 28 :])
        assert OverridesParser.create().parse_override(f"key={remedy}").value() == text
        assert text_problem(remedy) is None


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_sweep(path)
    return str(caught.value)


def test_numbers_that_yaml_takes_for_text_are_told_with_the_remedy(tmp_path: Path) -> None:
    lines = write(tmp_path / "s.yaml", parameters={"optim.lr": {"distribution": "log_uniform_values"}}).read_text()
    path = tmp_path / "s.yaml"
    path.write_text(lines.replace("distribution: log", "min: 1e-5\n    max: 2e2\n    distribution: log"))
    told = refused(path)
    for given, remedy in (("1e-5", "1.0e-5"), ("2e2", "2.0e+2")):
        assert f"the text '{given}': to YAML 1.1 it is a number only with a point and a sign; write {remedy}" in told
        assert yaml.safe_load(remedy) == float(given)
    parameters = {
        "optim.lr": {"min": 0.1, "max": "fast"},
        "optim.weight_decay": {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0},
        "delta_weight": {"min": 0.0, "max": math.inf},
    }
    told = refused(write(path, parameters=parameters))
    for part in ("max is 'fast'; give a number", "q is 0; it must be above 0", "max is inf; give a finite number"):
        assert part in told


def test_values_of_another_type_than_the_key_takes_are_refused(tmp_path: Path) -> None:
    parameters = {
        "model.trust_remote_code": {"values": [True, "no"]},
        "loss.temperature": {"values": [1, "warm", "1e0"]},
        "seed": {"min": 0.0, "max": 3.0},
        "data.batch_size": {"distribution": "q_uniform", "min": 2, "max": 8, "q": 2},
        "loss": {"values": ["kd", "delta_kd"]},
    }
    with pytest.raises(ConfigError) as caught:
        check_types(read_sweep(write(tmp_path / "s.yaml", parameters=parameters)))
    told = str(caught.value)
    for part in (
        "model.trust_remote_code is 'no'; it must be true or false",
        "loss.temperature is 'warm'; it must be a finite number",
        "seed is 0.0; it must be a whole number from 0 to 4294967295; write 0",
    ):
        assert part in told, told
    assert "data.batch_size" not in told
    assert "'1e0'" not in told


def test_a_group_within_a_group_is_no_parameter_for_wandb_and_what_to_use_is_said(tmp_path: Path) -> None:
    told = refused(write(tmp_path / "s.yaml", parameters={"loss/divergence": {"values": ["todi", "jsd"]}}))
    assert "parameters.loss/divergence: W&B takes no slash" in told
    assert "--multirun loss/divergence=A,B" in told
    assert "does not match" not in told
    inside = [*COMMAND[:-1], "loss/divergence=todi", COMMAND[-1]]
    read_sweep(write(tmp_path / "s.yaml", parameters={"seed": {"values": [1, 2]}}, command=inside))


@pytest.mark.parametrize("text", ["", "- a", "method: grid\n\tparameters: {}", "parameters: [a]", "parameters:"])
def test_a_sweep_file_of_another_shape_is_refused_in_words(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    assert str(tmp_path / "s.yaml") in refused(tmp_path / "s.yaml")


def test_whole_steps_are_drawn_as_whole_numbers() -> None:
    parameter = Interval(2, 8, step=2)
    trial = optuna.create_study().ask()
    drawn = suggest(trial, "data.batch_size", parameter)
    assert isinstance(drawn, int)
    assert drawn in (2, 4, 6, 8)


def test_the_check_is_a_command_and_names_the_nearest_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--check", str(ROOT / "sweeps" / "delta_weight_grid.yaml")])
    assert "fine (grid over delta_weight, 5 runs; maximize val/rougeL)" in capsys.readouterr().out
    path = write(tmp_path / "s.yaml", parameters={"los.temperature": {"min": 1.0, "max": 2.0}})
    with pytest.raises(SystemExit, match="2"):
        main(["--check", str(path)])
    assert "there is no config key 'los.temperature'; the nearest one is 'loss.temperature'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_agent_takes_two_runs_of_the_grid(world: World, tmp_path: Path) -> None:
    """`wandb sweep` and `wandb agent` as their users type them; the server is ours, and the models are tiny."""
    tiny = world.overrides(
        tmp_path / "unused", "delta_kd", "logger=[csv,wandb]", "evaluation=default", "evaluation.val_limit=2",
        "trainer.val_every_n_steps=2",
    )  # fmt: skip
    content = yaml.safe_load((ROOT / "sweeps" / "delta_weight_grid.yaml").read_text())
    start = content["command"].index("experiment=delta_kd_gpt2")
    content["command"][start:-1] = [o for o in tiny if not o.startswith("run_dir=")]
    (tmp_path / "delta_weight_grid.yaml").write_text(yaml.safe_dump(content))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    with wandb_server.serve(count=2) as server:
        environment |= {
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HOME": str(tmp_path),
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "0" * 40,
        }
        made = wandb("sweep", "delta_weight_grid.yaml", cwd=tmp_path, environment=environment)
        command = re.search(r"wandb agent (\S+)", made)
        assert command, made
        shown = wandb("agent", command[1], cwd=tmp_path, environment=environment)
    assert server.given == {"run0": {"delta_weight": 0}, "run1": {"delta_weight": 0.25}}
    assert server.exit_codes == {"run0": 0, "run1": 0}, shown
    for run, parameters in server.given.items():
        rows = [row for row in server.history[run] if "val/rougeL" in row]
        # Three validations: early termination sees the run on its way.
        assert [row["trainer/global_step"] for row in rows] == [2, 4, 6]
        directory = RunDirectory(tmp_path / "outputs" / "run" / wandb_server.SWEEP / run)
        assert directory.read_summary()["val/rougeL"] == max(row["val/rougeL"] for row in rows)
        assert yaml.safe_load(directory.config.read_text())["delta_weight"] == parameters["delta_weight"]
        assert (directory.path / "wandb_id").read_text() == run
        assert server.upserts[run]["sweep"] == wandb_server.SWEEP


def wandb(*arguments: str, cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "wandb"), *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
