"""``deltakd <command> ...``: the same as ``python -m deltakd.<command>``, down to the processes that it starts."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.tiny import World

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "deltakd"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The console script as pip writes it, in a folder of its own."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["deltakd"]
    module, function = entry.split(":")
    path = tmp_path / "bin" / "deltakd"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def deltakd(script: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the console script."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return start([str(script), *arguments], tmp_path, **variables)

    return run


def start(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def test_help_lists_every_command_in_a_line(deltakd: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = deltakd("--help")
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    # A command is a module at the top that says what it is when it is run.
    commands = [path.stem for path in PACKAGE.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()]
    assert sorted(listed) == sorted(set(commands) - {"__main__"})
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    bare = deltakd()
    assert (bare.returncode, bare.stdout, bare.stderr) == (2, "", done.stdout)


def test_an_unknown_command_is_answered_with_the_nearest_one(
    deltakd: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = deltakd("trian", "experiment=quickstart")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no command 'trian'; the nearest is 'train'; allowed: init, train, ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [(), ("--multirun",)])
def test_train_alone_says_what_to_give(
    arguments: tuple[str, ...], deltakd: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = deltakd("train", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nothing to train yet; give models and data:\n")
    assert {"model.student.path=...", "data.train=my.jsonl", "experiment=quickstart"} <= set(done.stderr.split())
    assert len(done.stderr.splitlines()) < 13


@pytest.mark.parametrize(
    "arguments", [("study", "--help"), ("train", "optim.lrr=1"), ("export", "rnu=x"), ("plan", "-x")]
)
def test_a_command_says_the_same_as_under_python_m(
    arguments: tuple[str, ...], deltakd: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    command, *rest = arguments
    script = deltakd(*arguments)
    expected = start([sys.executable, "-m", f"deltakd.{command}", *rest], tmp_path)
    package = start([sys.executable, "-m", "deltakd", *arguments], tmp_path)
    for done in (script, package):
        assert (done.returncode, done.stdout, done.stderr) == (expected.returncode, expected.stdout, expected.stderr)


def test_bash_completes_commands_keys_and_choices(script: Path, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    # What readline does on a press of the tabulator key.
    code = r"""
    eval "$(deltakd -sc install=bash)"
    complete -p deltakd
    press() {
        COMP_LINE=$1 COMP_POINT=${#1} COMPREPLY=()
        read -ra words <<< "$1"
        COMP_CWORD=$(( ${#words[@]} - 1 ))
        hydra_bash_completion
        echo "${COMPREPLY[*]}"
    }
    press "deltakd tra"
    press "deltakd train optim.weight_d"
    press "deltakd evaluate loss=sft strategy=dd"
    press "deltakd report loss="
    """
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    done = start([bash, "--norc", "-c", code], tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    installed, *completed = done.stdout.splitlines()
    assert installed.endswith("hydra_bash_completion deltakd")
    assert completed == ["train", "optim.weight_decay=", "strategy=ddp", ""]


def test_no_two_files_of_the_package_have_one_name() -> None:
    names = Counter(path.name for path in PACKAGE.rglob("*.py"))
    assert [name for name, count in names.items() if count > 1 and name not in ("__init__.py", "settings.py")] == []


@pytest.mark.slow
def test_two_processes_and_two_jobs_start_as_under_python_m(
    world: World, deltakd: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Lightning and joblib start further processes by what they find of the command in this one."""
    two = ["trainer.devices=2", "strategy=ddp", "trainer.accelerator=cpu", "data.batch_size=2"]
    script = deltakd("train", *world.overrides(tmp_path / "script", "sft", *two))
    assert script.returncode == 0, script.stderr
    module = [sys.executable, "-m", "deltakd.train", *world.overrides(tmp_path / "module", "sft", *two)]
    expected = start(module, tmp_path)
    (objective,) = script.stdout.splitlines()[-1:]
    assert objective.startswith("val/loss = ")
    assert objective.replace("/script", "/module") == expected.stdout.splitlines()[-1]
    weights = [load_file(tmp_path / name / "student" / "model.safetensors") for name in ("script", "module")]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[1])
    jobs = [o for o in world.overrides(tmp_path / "jobs", "sft", "seed=0,1") if not o.startswith("run_dir=")]
    for launcher in ("joblib", "submitit_local"):
        done = deltakd("train", "--multirun", *jobs, f"hydra/launcher={launcher}", f"run_dir={launcher}")
        assert done.returncode == 0, done.stderr
        assert "best val/loss = " in done.stdout
        with (tmp_path / launcher / "multirun.csv").open() as file:
            assert [row["state"] for row in csv.DictReader(file)] == ["finished", "finished"]
