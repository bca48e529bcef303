"""Experiments and losses in folders of the user's own: written by init, found by every command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deltakd import train
from deltakd.config.build import make_settings
from deltakd.config.compose import CONF_DIR, check_overrides, compose_config
from deltakd.config.folders import CONFIG_DIR_VARIABLE, config_folders, use_config_dir
from deltakd.config.instantiate import built
from deltakd.config.loss_names import known_losses
from deltakd.init import main, write_experiment
from deltakd.io.errors import ConfigError
from tests.tiny import World

ROOT = Path(__file__).resolve().parents[2]
LOSS = """
from torch import Tensor
from deltakd.types import Loss, LossOutput


class Squared(Loss):
    requires = frozenset({"teacher"})

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, logits: dict[str, Tensor], labels: Tensor) -> LossOutput:
        return LossOutput(self.scale * (logits["student"] - logits["teacher"]).square().mean(-1), {})
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's, as working directory; what a command changes in the process is put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv(CONFIG_DIR_VARIABLE, "")
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write_loss(project: Path, module: str) -> None:
    (project / f"{module}.py").write_text(LOSS)
    (project / "conf" / "loss").mkdir(parents=True)
    (project / "conf" / "loss" / "squared.yaml").write_text(f"_target_: {module}.Squared\nscale: 2.0\n")


def values(world: World) -> list[str]:
    return [
        f"student={world.root / 'student_raw'}", f"teacher={world.root / 'teacher'}",
        f"teacher_raw={world.root / 'teacher_raw'}", f"data={world.root / 'train.jsonl'}", "lr=1e-3", "max_steps=3",
        "max_length=100", "max_prompt_length=60",
    ]  # fmt: skip


def test_init_writes_an_experiment_that_trains_as_it_stands(
    project: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["my_run", *values(world)])
    assert capsys.readouterr().out.splitlines()[:2] == [
        "wrote conf/experiment/my_run.yaml",
        "then: python -m deltakd.train experiment=my_run    (with trainer.dry_run=true first: what it needs of memory)",
    ]
    settings = make_settings(compose_config("train", ["experiment=my_run", "logger=csv", "optim.weight_decay=0"]))
    assert (settings.name, settings.loss_name, settings.optim.lr) == ("my_run", "delta_kd", 1e-3)
    assert settings.specs["student_raw"].path == str(world.root / "student_raw")
    assert settings.trainer.max_epochs is None
    assert (settings.trainer.max_steps, settings.data.max_length, settings.data.template) == (3, 100, "alpaca")


def test_init_says_what_is_still_to_be_filled_in(project: Path) -> None:
    path, missing = write_experiment("mine", ["student=gpt2"], Path("conf"))
    assert missing == ["model.teacher.path", "model.teacher_raw.path", "data.train"]
    text = path.read_text()
    assert text.splitlines()[1] == "# python -m deltakd.train experiment=mine"
    assert all(len(line) <= 130 for line in text.splitlines())
    assert write_experiment("sft", ["loss=sft", "data=my.jsonl"], Path("conf"))[1] == ["model.student.path"]


def test_what_init_leaves_as_it_is_are_the_defaults(project: Path) -> None:
    path, _ = write_experiment("mine", [], Path("conf"))
    assert yaml.safe_load(path.read_text())["defaults"] == [{"override /loss": "delta_kd"}]
    own, base = compose_config("train", ["experiment=mine"]), compose_config("train", ["name=mine"])
    assert own == base


def test_files_that_init_is_given_are_found_from_any_folder(project: Path) -> None:
    Path("rows.jsonl").touch()
    given = ["data=[rows.jsonl,owner/name]", "sets={a: rows.jsonl}", "teacher=owner/model", "template=chat"]
    path, _ = write_experiment("mine", given, Path("conf"))
    written = yaml.safe_load(path.read_text())
    assert written["data"]["train"] == [str(project / "rows.jsonl"), "owner/name"]
    assert written["data"]["sets"] == {"a": str(project / "rows.jsonl")}
    assert written["model"]["teacher"]["path"] == "owner/model"


def test_init_overwrites_nothing_and_says_all_problems_at_once(project: Path) -> None:
    write_experiment("mine", [], Path("conf"))
    with pytest.raises(ConfigError) as caught:
        write_experiment("mine", ["los=kd", "lr=a(b", "loss=kdd"], Path("conf"))
    assert [problem.split(";")[0][:45] for problem in caught.value.problems] == [
        "conf/experiment/mine.yaml exists and is not o",
        "'los=kd' is none of student=..., teacher=...,",
        "lr=a(b: no viable alternative at input 'a(b'",
        "loss=kdd does not exist",
    ]


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("a/b", "conf", "can't be the name of an experiment"),
        ("quickstart", "conf", "quickstart is an experiment of deltakd's own"),
        ("mine", str(CONF_DIR), "is deltakd's own; start `deltakd init` in a folder of your project"),
    ],
)
def test_init_refuses_a_name_or_a_place(name: str, folder: str, message: str, project: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        write_experiment(name, [], Path(folder))


def test_a_loss_of_ones_own_lies_beside_the_experiment(project: Path, world: World) -> None:
    write_loss(project, "losses_of_mine")
    write_experiment("mine", [*values(world), "loss=squared"], Path("conf"))
    os.chdir(project.parent)
    with pytest.raises(ConfigError, match="experiment=mine does not exist"):
        check_overrides("train", ["experiment=mine"])
    use_config_dir("project/conf")
    settings = make_settings(compose_config("train", ["experiment=mine", "loss.scale=3", "logger=csv"]))
    assert (settings.loss_name, settings.loss.requires, settings.loss.scale) == ("squared", {"teacher"}, 3.0)
    assert known_losses().losses["squared"] == {"_target_": "losses_of_mine.Squared", "scale": 2.0}


def test_the_packages_own_files_come_first_and_hidden_ones_are_named(project: Path) -> None:
    (project / "conf" / "loss").mkdir(parents=True)
    (project / "conf" / "loss" / "kd.yaml").write_text("_target_: somewhere.Else\n")
    assert config_folders() == [CONF_DIR, project / "conf"]
    with pytest.raises(ConfigError, match=r"loss=kd means .*, which hides .*project/conf/loss/kd.yaml; rename that"):
        compose_config("train", ["loss=kd"])
    assert known_losses().losses["kd"]["_target_"] == "deltakd.losses.Distillation"


def test_a_conf_folder_of_another_program_does_no_harm(project: Path) -> None:
    for file, text in (
        ("train.yaml", "seed: 7\n"), ("loss/a.yaml", "[1, 2"), ("loss/b.yaml", "- 1\n"),
        ("evaluation/c.yaml", "a: [\n"),
        ("model/default.yaml", "seed: 7\n"), ("loss/c.yaml", "# @package _global_\nx: 1\n"),
    ):  # fmt: skip
        (project / "conf" / file).parent.mkdir(parents=True, exist_ok=True)
        (project / "conf" / file).write_text(text)
    with pytest.raises(ConfigError, match=r"model\.student\.path is missing"):
        make_settings(compose_config("train", []))
    assert compose_config("train", []).seed == 0
    assert "a" not in known_losses().losses


def test_no_folder_is_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match="--config-dir nowhere is not a folder"):
        use_config_dir("nowhere")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  lr: 0.0005", "  lrr: 0.0005", r"optim has no key 'lrr'; the nearest is 'lr'; allowed: betas, "),
        ("  batch_size", "  batchsize", r"data has no key 'batchsize'; the nearest is 'batch_size'"),
        ("\nseed:", "\nsed:", r"there is no config key 'sed'; the nearest one is 'seed'"),
        ("loss: delta_kd", "loss: delta_kdd", r"loss=delta_kdd does not exist; the nearest is 'delta_kd'; allowed: "),
        ("seed: 0", "seed: [0", r"expected ',' or ']', .*experiment/mine.yaml\", line \d+"),
    ],
)
def test_a_typo_in_an_experiment_is_told_with_the_nearest_name(old: str, new: str, message: str, project: Path) -> None:
    path, _ = write_experiment("mine", ["student=gpt2"], Path("conf"))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        make_settings(compose_config("train", ["experiment=mine"]))


def test_a_key_that_others_are_copied_from_is_none_too_many(project: Path) -> None:
    path, _ = write_experiment("mine", [], Path("conf"))
    path.write_text(path.read_text().replace("max_length: 512", "max_length: ${longest}") + "\nlongest: 77\n")
    assert compose_config("train", ["experiment=mine", "data.batch_size=2"]).data.max_length == 77


@pytest.mark.slow
def test_every_command_finds_them(project: Path, world: World) -> None:
    write_loss(project, "losses_of_mine")
    write_experiment("mine", [*values(world), "max_steps=2"], Path("conf"))
    quick = ["logger=csv", "evaluation=none", "evaluation.measures.rows=0", "trainer.enable_progress_bar=false"]
    sweep = "method: grid\nmetric: {name: train/loss, goal: minimize}\nparameters: {seed: {values: [1, 2]}}\n"
    command = "command: ['${env}', '${interpreter}', -m, deltakd.train, experiment=mine, '${args_no_hyphens}']\n"
    (project / "sweep.yaml").write_text(sweep + command)
    (project / "study.yaml").write_text("stages: {only: {overrides: [experiment=mine, loss=squared]}}\n")
    elsewhere = project.parent
    for arguments in (
        ["train", "--multirun", "experiment=mine", "loss=squared,kd", "run_dir=many", *quick],
        ["cache", "experiment=mine", "reference.path=cached"],
        ["generate", "experiment=mine", "run_dir=answers", "evaluation.decoding.max_new_tokens=2"],
        ["plan", "experiment=mine"],
        ["search", "--check", "project/sweep.yaml"],
        ["evaluate", "run=many/0", f"evaluation.sets={{test: {world.root / 'test.jsonl'}}}", "run_dir=scores"],
    ):
        own = [] if arguments[0] == "evaluate" else ["--config-dir", "project/conf"]
        done = subprocess.run(
            [sys.executable, "-m", f"deltakd.{arguments[0]}", *own, *arguments[1:]],
            cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stderr)
    assert yaml.safe_load((elsewhere / "many" / "0" / "config.yaml").read_text())["loss"]["scale"] == 2.0


def test_a_mapping_takes_keys_of_the_users_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["data.sets={mine: my.jsonl}", "optim.schedule_options={num_cycles: 2}", "delta_weight={schedule: linear}"]
    cfg = compose_config("train", given)
    assert (cfg.data.sets, cfg.optim.schedule_options) == ({"mine": "my.jsonl"}, {"num_cycles": 2})
    assert cfg.delta_weight == {"schedule": "linear"}
    monkeypatch.setattr("sys.argv", ["deltakd.train", *given, "--cfg", "job"])
    train.main()
    assert "mine: my.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("data.train=a.jsonl#kind=x", """'data.train="a.jsonl#kind=x"'"""),
        ("data.train=[a.jsonl#kind=x]", "put each text in the list or mapping that has special characters"),
    ],
)
def test_an_override_that_hydra_cannot_parse_says_how_to_quote_it(override: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config("train", ["seed=1", override])
    assert remedy in str(caught.value)
    assert compose_config("train", ['data.train="a.jsonl#kind=x"']).data.train == "a.jsonl#kind=x"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("hellingr.Hellinger", "there is no module 'hellingr' beside conf/, on PYTHONPATH or installed"),
        ("targets_of_mine.Helinger", "targets_of_mine has no 'Helinger'; the nearest is 'Hellinger'"),
        ("unreadable_of_mine.Loss", "importing {}/unreadable_of_mine.py fails: SyntaxError: "),
        ("broken_of_mine.Loss", "importing broken_of_mine fails at {}/broken_of_mine.py:2: ZeroDivisionError: "),
    ],
)
def test_a_target_that_cannot_be_imported_is_one_clear_problem(
    target: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "targets_of_mine.py").write_text("class Hellinger: ...\n")
    (tmp_path / "unreadable_of_mine.py").write_text("class Loss:\n    def (\n")
    (tmp_path / "broken_of_mine.py").write_text("import torch\n1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    problems: list[str] = []
    node = {"_target_": "deltakd.losses.Distillation", "target": {"_target_": target}}
    assert built(node, "loss", problems) is None
    [problem] = problems
    assert problem.startswith(f"loss.target._target_ is {target!r}, but {said.format(tmp_path)}")
    assert not caplog.records


def test_a_glob_is_left_to_hydra() -> None:
    check_overrides("train", ["loss=glob(kd*)"])
    check_overrides("train", ["model=glob(*)"])
