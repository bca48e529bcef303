"""What is written when the disk takes no more: the former stays, nothing half is left, and the reason is told."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltakd.cli import guarded
from deltakd.io.files import WriteError, disk_reason, replacing
from deltakd.io.json_lines import write_generations
from deltakd.io.run_directory import write_text
from deltakd.tracking.loggers import RunCSVLogger


@contextmanager
def no_room(limit: int = 2000) -> Iterator[None]:
    """The system takes no files beyond so many bytes from this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _text(path: Path, size: int) -> None:
    write_text(path, "x" * size)


def _tensors(path: Path, size: int) -> None:
    with replacing(path, "weights") as partial:
        partial.mkdir()
        save_file({"a": torch.zeros(size)}, partial / "model.safetensors")


def _checkpoint(path: Path, size: int) -> None:
    with replacing(path, "a checkpoint") as partial:
        torch.save({"a": torch.zeros(size)}, partial)


def _answers(path: Path, size: int) -> None:
    write_generations(path, [{"text": "x" * size}])


@pytest.mark.parametrize("write", [_text, _tensors, _checkpoint, _answers])
def test_what_was_there_stays(write: Callable[[Path, int], None], tmp_path: Path) -> None:
    path = tmp_path / "file"

    def content() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    write(path, 10)
    before = content()
    with no_room(), pytest.raises(WriteError, match=f"could not be written to {path}: ") as caught:
        write(path, 100_000)
    assert caught.value.reason in ("File too large", "only a part of it could be written")
    assert content() == before
    write(path, 100_000)
    assert content() != before


def test_metrics_stay_when_a_new_column_finds_no_room(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    logger = RunCSVLogger(tmp_path, 0)
    logger.log_metrics({"loss": 1.5}, 1)
    logger.save()
    before = file.read_text()
    with no_room(10):
        logger.log_metrics({"loss": 1.25, "rougeL": 3.0}, 2)
        with pytest.raises(WriteError, match=r"metrics could not be written .*; the former metrics\.csv is kept"):
            logger.save()
        logger.finalize("failed")
        with pytest.raises(WriteError):
            RunCSVLogger(tmp_path, 1)
    logger = RunCSVLogger(tmp_path, 1)
    assert file.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]
    logger.log_metrics({"loss": 1.25, "rougeL": 3.0}, 2)
    logger.save()
    assert file.read_text().splitlines()[0] == "loss,rougeL,step"


def test_users_get_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def fill() -> None:
        raise RuntimeError("the library gave up") from OSError(errno.ENOSPC, "no room")

    with pytest.raises(SystemExit) as caught:
        guarded(fill, "the same command with resume=true")
    assert caught.value.code == 2
    said = "error: the disk failed (No space left on device). Make room, then: the same command with resume=true\n"
    assert capsys.readouterr().err == said
    assert disk_reason(OSError(errno.ENOENT, "no such file")) is None
