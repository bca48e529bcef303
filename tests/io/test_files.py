"""Files are whole or not there: when the disk takes no more, when the writer is killed, and when several write."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltakd.cli import guarded
from deltakd.io.arrays import kept_arrays
from deltakd.io.files import (
    WriteError,
    disk_reason,
    path_beside,
    read_json_lines,
    replacing,
    write_bytes,
    write_json,
    write_json_lines,
    write_text,
)
from deltakd.io.run_directory import RunDirectory
from deltakd.references.store import CacheStore
from deltakd.tracking.csv_run import RunCSVLogger


@contextmanager
def no_room(limit: int = 2000) -> Iterator[None]:
    """The system lets this process write no file larger than this many bytes."""
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
    write_json_lines(path, [{"text": "x" * size}])


def _directory_over_another(path: Path, size: int) -> None:
    with replacing(path) as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "file").write_bytes(bytes(size))


@pytest.mark.parametrize("write", [_text, _tensors, _checkpoint, _answers, _directory_over_another])
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


def test_a_write_that_the_disk_refuses_at_its_end_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            WriteError, match=r"file could not be .*No space left on device; the former file is"
        ) as told:
            write_bytes(path, b"after")
    assert told.value.is_full
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"before"


WRITE_UNTIL_KILLED = """
import itertools, sys
from pathlib import Path
from deltakd.io.files import replacing, write_text
folder = Path(sys.argv[1])
for number in itertools.count():
    write_text(folder / "text", f"{number}\\n" * 20_000)
    with replacing(folder / "model") as partial:
        partial.mkdir()
        for name in "ab":
            (partial / name).write_text(f"{number}\\n" * 20_000)
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_no_half_file_and_the_next_one_clears_up(tmp_path: Path) -> None:
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_UNTIL_KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(3):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        # Between its two renames a directory may be away; half of one is never there.
        contents = [(tmp_path / "text").read_text()]
        if (tmp_path / "model").exists():
            contents += [(tmp_path / "model" / name).read_text() for name in "ab"]
        for content in contents:
            assert len(lines := content.splitlines()) == 20_000
            assert len(set(lines)) == 1
        assert len(set(contents[1:])) <= 1
    write_text(tmp_path / "text", "")
    with replacing(tmp_path / "model") as partial:
        partial.mkdir()
    assert {p.name for p in tmp_path.iterdir()} == {"text", "model"}


def test_only_leftovers_of_the_same_file_and_of_processes_that_are_gone_are_cleared(tmp_path: Path) -> None:
    path = tmp_path / "model"
    gone, here = path_beside(path, process=2**22 + 1), path_beside(path)
    other_machine = tmp_path / "model.00000000-1-0.partial"
    other_file = path_beside(tmp_path / "model.bin", process=2**22 + 1)
    for leftover in (gone, here, other_machine, other_file):
        leftover.write_text("x")
    write_text(path, "y")
    assert {p for p in tmp_path.iterdir() if p != path} == {here, other_machine, other_file}
    os.utime(other_machine, (0, 0))
    write_text(path, "y")
    assert not other_machine.exists()


def test_many_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"

    def write(number: int) -> None:
        with replacing(path) as partial:
            partial.mkdir()
            for name in "ab":
                (partial / name).write_text(str(number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert (path / "a").read_text() == (path / "b").read_text()
    assert [p.name for p in path.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(("first_wins", "expected"), [(True, "theirs"), (False, "ours")])
def test_who_wins_when_another_process_is_first(tmp_path: Path, first_wins: bool, expected: str) -> None:
    path = tmp_path / "tokens"
    with replacing(path, first_wins=first_wins) as partial:
        partial.mkdir()
        (partial / "file").write_text("ours")
        path.mkdir()
        (path / "file").write_text("theirs")
    assert (path / "file").read_text() == expected
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"]


def test_json_and_its_lines_are_read_back(tmp_path: Path) -> None:
    value = {"é": [1, None, 0.1], "of": {"a": "\u2028\n"}}
    write_json(tmp_path / "value.json", value)
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8")) == value
    write_json_lines(tmp_path / "new" / "lines.jsonl", [value, {}])
    assert read_json_lines(tmp_path / "new" / "lines.jsonl") == [value, {}]
    assert read_json_lines(tmp_path / "none.jsonl") is None


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


@contextmanager
def no_permission() -> Iterator[Path]:
    """A folder in which this process may read, and not write; the superuser becomes somebody else for the time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "held.json").write_text("{}")
        folder.chmod(0o555)
        is_super = os.geteuid() == 0
        if is_super:
            os.seteuid(54321)
        try:
            yield folder
        finally:
            if is_super:
                os.seteuid(0)
            folder.chmod(0o755)


def _claimed_run(folder: Path) -> None:
    RunDirectory(folder / "new").claim({"seed": 1}, resume=False)


def _cache_of_references(folder: Path) -> None:
    CacheStore.create(folder / "new", {}, [])


def _table_of_tokens(folder: Path) -> None:
    kept_arrays("new", folder, {"ids": "<i4"}, lambda writer: writer.append("ids", [1]), "tokens")


def _exported_student(folder: Path) -> None:
    with replacing(folder / "new", "the student") as partial:
        partial.mkdir()


def _text_over_another(folder: Path) -> None:
    write_text(folder / "held.json", "[]")


@pytest.mark.parametrize(
    "write", [_claimed_run, _cache_of_references, _table_of_tokens, _exported_student, _text_over_another]
)
def test_a_place_that_may_not_be_written_to_is_told_with_what_to_do(
    write: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with no_permission() as folder:
        with pytest.raises(SystemExit) as caught:
            guarded(lambda: write(folder), "the same command")
        assert (folder / "held.json").read_text() == "{}"
        assert [path.name for path in folder.iterdir()] == ["held.json"]
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f" could not be written to {folder}/" in said
    assert said.endswith("Get access to it, then: the same command; or give another place\n")
    assert "Permission denied" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_what_may_not_be_touched_is_named(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def touch() -> None:
        raise OSError(number, os.strerror(number), "/data/rows.jsonl")

    with pytest.raises(SystemExit):
        guarded(touch, "")
    reason = os.strerror(number)
    expected = f"error: /data/rows.jsonl: {reason}. Get access to it, then: the same command; or give another place\n"
    assert capsys.readouterr().err == expected
