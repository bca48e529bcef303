"""Real processes that are killed, stopped and left without room, and their runs resumed (`make test-slow`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltakd.io.run_directory import LAST
from deltakd.training.callbacks.checkpoints import read_checkpoint
from tests.distributed.test_scale import chosen, metrics
from tests.tiny import World, save_model

pytestmark = pytest.mark.slow

SAVING = ["trainer.checkpoint_every_n_steps=2", "trainer.val_every_n_steps=6"]
#: Seconds that the ranks may take to end, on a busy machine, too.
LIMIT = 60


def options(strategy: str) -> list[str]:
    many = [] if strategy == "auto" else [*chosen(strategy), "trainer.devices=2"]
    return [*many, f"data.batch_size={4 if many else 8}", *SAVING]


def start(world: World, directory: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """``python -m deltakd.train`` as a user starts it; dropout is off, since each rank draws its own."""
    student = world.root / "plain"
    if not student.is_dir():
        save_model(student, seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    common = [f"model.student.path={student}", "optim.lr=0.001", "optim.eps=1e-4", "trainer.accelerator=cpu"]
    command = [sys.executable, "-m", "deltakd.train", *world.overrides(directory, "kd", *common, *overrides)]
    # The callbacks of tests.distributed.faults are found beside the package.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(command, env=environment, cwd=world.root, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def uninterrupted(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run that nothing happens to, of a strategy."""
    done: dict[str, Path] = {}

    def get(strategy: str) -> Path:
        if strategy not in done:
            directory = tmp_path_factory.mktemp("whole") / strategy
            ended = start(world, directory, *options(strategy))
            assert ended.returncode == 0, ended.stderr[-3000:]
            done[strategy] = directory
        return done[strategy]

    return get


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def hurt(world: World, directory: Path, strategy: str, callback: str) -> subprocess.CompletedProcess[str]:
    return start(
        world, directory, *options(strategy), f"+callbacks.fault={{_target_: tests.distributed.faults.{callback}}}"
    )


def check_goes_on(world: World, directory: Path, strategy: str, whole: Path) -> None:
    """With the same command the run ends as if nothing had happened."""
    config = directory / "config.yaml"
    # The fault is part of the config, and is not to come again.
    config.write_text(re.sub(r"callbacks:\n  fault:\n(    .*\n)+", "callbacks: {}\n", config.read_text()))
    done = start(world, directory, *options(strategy), "resume=true")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("train/loss", "val/loss"):
        torch.testing.assert_close(metrics(directory, name), metrics(whole, name), rtol=1e-6, atol=0)
    expected, found = (load_file(path / "student" / "model.safetensors") for path in (whole, directory))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("strategy", "rank"), [("ddp", 1), ("ddp", 0), ("fsdp", 1), ("deepspeed_zero2", 1)])
def test_a_killed_rank_is_named_and_the_run_goes_on(
    strategy: str, rank: int, world: World, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    whole, directory = uninterrupted(strategy), tmp_path / "run"
    done = hurt(world, directory, strategy, f"Signal, name: SIGKILL, ranks: [{rank}], step: 3")
    ended = time.time()
    killed = float(re.search(r"<([\d.]+)>", done.stdout)[1])
    assert ended - killed < LIMIT
    assert done.returncode == (1 if rank else -9)
    said = rf"rank {1 - rank} ends: rank {rank} \(pid \d+ on .*\) has died; this was after 3 optimiser steps\. "
    assert re.search(said + f"To continue .*: the same command with resume=true run_dir={directory}\n", done.stderr)
    assert "Traceback" not in done.stderr
    assert read_checkpoint(directory / "checkpoints" / LAST)["global_step"] == 2
    check_goes_on(world, directory, strategy, whole)


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("ddp", [0, 1]), ("fsdp", [0, 1]), ("deepspeed_zero2", [0, 1]), ("ddp", [1])]
)
def test_sigterm_saves_and_ends(
    strategy: str, ranks: list[int], world: World, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """At the end of the step at work, whoever got the signal."""
    whole, directory = uninterrupted(strategy), tmp_path / "run"
    done = hurt(world, directory, strategy, f"Signal, name: SIGTERM, ranks: {ranks}, step: 2")
    assert done.returncode == 128 + 15, done.stderr[-3000:]
    assert "stopped by SIGTERM after 3 optimiser steps; the state is saved" in done.stderr
    assert "Traceback" not in done.stderr
    assert " ends: rank " not in done.stderr
    assert read_checkpoint(directory / "checkpoints" / LAST)["global_step"] == 3
    check_goes_on(world, directory, strategy, whole)


def check_nothing_half(directory: Path) -> None:
    assert not [p.name for p in directory.rglob("*") if "partial" in p.name]


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp", "deepspeed_zero2"])
def test_a_full_disk_leaves_the_checkpoint_before(
    strategy: str, world: World, small_disk: Path, uninterrupted: Callable[[str], Path]
) -> None:
    whole, directory = uninterrupted(strategy), small_disk / "run"
    ballast = small_disk / "ballast"
    done = hurt(world, directory, strategy, f"FullDisk, ballast: {ballast}, step: 4")
    assert done.returncode in ((2,) if strategy == "auto" else (1, 2))
    sentence = f"the checkpoint of step 4 could not be written to {directory}/checkpoints: "
    assert sentence in done.stderr
    assert re.search(r"No space left on device|only a part of it could be written", done.stderr)
    assert "; the checkpoint of step 2 is kept. Make room, then: the same command with resume=true" in done.stderr
    assert "Traceback" not in done.stderr
    assert read_checkpoint(directory / "checkpoints" / LAST)["global_step"] == 2
    check_nothing_half(directory)
    ballast.unlink()
    check_goes_on(world, directory, strategy, whole)


def test_no_room_for_the_student(world: World, tmp_path: Path, uninterrupted: Callable[[str], Path]) -> None:
    """The main process exports alone while the others wait for it."""
    whole, directory = uninterrupted("ddp"), tmp_path / "run"
    done = hurt(world, directory, "ddp", "FullDisk, ballast: null, step: null")
    assert done.returncode == 2
    sentence = f"the student could not be written to {directory}/student: File too large"
    assert re.search(rf"rank 1 ends: rank 0 .* has failed \({sentence}\)", done.stderr)
    assert f"error: {sentence}. Make room, then: the same command with resume=true run_dir={directory}" in done.stderr
    assert "Traceback" not in done.stderr
    check_nothing_half(directory)
    check_goes_on(world, directory, "ddp", whole)
    shutil.rmtree(directory)
