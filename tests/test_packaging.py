"""A wheel installs the package with its configs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: All that the repository's first page lists.
TOP_LEVEL = {
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"),
    *("Makefile", "pyproject.toml", "constraints.txt", "mkdocs.yml", ".gitignore", ".importlinter"),
    *("deltakd", "conf", "experiments", "sweeps", "tests", "docs", ".ci", ".github"),
}


def test_nothing_else_is_at_the_top_level() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name.partition("/")[0] for name in listed.splitlines()} - TOP_LEVEL == set()


@pytest.mark.slow
def test_a_wheel_holds_the_configs_and_composes_them(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("deltakd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name.partition("/")[0].partition("-")[0] for name in archive.namelist()} == {"deltakd"}
        assert not [name for name in archive.namelist() if "docs" in name]
        archive.extractall(tmp_path / "site")
    assert (tmp_path / "site" / "deltakd" / "conf" / "train.yaml").is_file()
    command = [sys.executable, "-m", "deltakd.train", "experiment=kd_gpt2", "--cfg", "job"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True, check=True
    )
    assert "MiniLLM/teacher-gpt2-1.5B" in done.stdout
