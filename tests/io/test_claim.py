"""A run that can't start leaves no directory behind; one that is continued keeps its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltakd.io.run_directory import RunDirectory


def refused(directory: RunDirectory, resume: bool = False) -> None:
    with directory.claim({"seed": 1}, resume=resume):
        (directory.path / "tokenizer").mkdir(exist_ok=True)
        (directory.path / "inputs.json").write_text("{}")
        raise ValueError("refused")


def test_a_claim_that_fails_is_given_back_with_the_folders_on_the_way(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"):
        refused(RunDirectory(tmp_path / "outputs" / "name" / "run"))
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    beside = tmp_path / "outputs" / "other"
    beside.mkdir(parents=True)
    empty = tmp_path / "outputs" / "mine"
    empty.mkdir()
    for path in (empty, tmp_path / "outputs" / "new"):
        with pytest.raises(ValueError, match="refused"):
            refused(RunDirectory(path))
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["mine", "other"]
    assert list(empty.iterdir()) == []


def test_a_run_that_is_continued_is_never_removed(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    with directory.claim({"seed": 1}, resume=False):
        pass
    with pytest.raises(ValueError, match="refused"):
        refused(directory, resume=True)
    assert directory.config.is_file()
