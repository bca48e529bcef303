"""A server as its users run it: a process of its own, killed, interrupted, and asked by several ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.run_directory import RunDirectory
from deltakd.references.serving.secret import TOKEN_VARIABLE
from deltakd.training.run import run_training
from tests.distributed.processes import free_port, on_ranks
from tests.references.serving.servers import TOKEN, at, serving
from tests.tiny import World, save_model

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def start(command: str, overrides: Sequence[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", f"deltakd.{command}", *overrides]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(overrides: Sequence[str], directory: Path) -> None:
    run_training(make_settings(compose_config("train", list(overrides))), directory)


def student(directory: Path) -> bytes:
    return (RunDirectory(directory).student / "model.safetensors").read_bytes()


def test_a_run_outlives_its_killed_server_over_tcp(world: World, tmp_path: Path) -> None:
    """It leaves its group of two with the dead server, and forms another one with the server that comes back."""
    asking = ["reference=served", f"reference.url=tcp://127.0.0.1:{free_port()}", "trainer.max_steps=120"]
    checked = "trainer.checkpoint_every_n_steps=1"
    train(world.overrides(tmp_path / "live", "delta_kd", asking[-1], checked), tmp_path / "live")
    overrides = world.overrides(tmp_path / "served", "delta_kd", *asking, checked, "reference.wait_s=300")
    overrides.append("reference.transport=gloo")
    server, trainer = start("serve", overrides), start("train", overrides)
    last = RunDirectory(tmp_path / "served").checkpoints / "last.ckpt"
    deadline = time.monotonic() + 300
    while not last.is_file():
        assert time.monotonic() < deadline
        assert trainer.poll() is None, trainer.communicate()[0]
        time.sleep(0.02)
    server.kill()
    server.communicate()
    again = start("serve", overrides)
    said, _ = trainer.communicate(timeout=400)
    assert trainer.returncode == 0, said
    assert "is back; training goes on" in said
    assert student(tmp_path / "served") == student(tmp_path / "live")
    again.send_signal(signal.SIGINT)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0
    assert "Traceback" not in said
    assert "Serving student_raw, teacher, teacher_raw at tcp://127.0.0.1:" in said
    assert TOKEN not in said


def test_a_server_at_a_taken_address_ends_in_one_line(world: World, place: Path) -> None:
    overrides = world.overrides(place, "kd", *at(place))
    with serving(overrides):
        said, _ = start("serve", overrides).communicate(timeout=300)
    assert "Traceback" not in said
    assert "can't be listened on (a server answers there)" in said


def test_two_ranks_train_on_what_one_does(world: World, tmp_path: Path, place: Path) -> None:
    # Each rank draws its own dropout.
    plain = save_model(tmp_path / "plain", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shared = (f"model.student.path={plain}", "trainer.accelerator=cpu", "trainer.val_every_n_steps=3")
    split = (*shared, "strategy=ddp", "trainer.devices=2", "data.batch_size=2")
    two, live, one = tmp_path / "two", tmp_path / "live", tmp_path / "one"
    on_ranks(2, train, world.overrides(live, "delta_kd", *split), live)
    with serving(world.overrides(place, "delta_kd", *shared, *at(place))):
        # Beside DDP's group, each rank has one with the server.
        on_ranks(2, train, world.overrides(two, "delta_kd", *split, *at(place, "reference.transport=gloo")), two)
        train(world.overrides(one, "delta_kd", *shared, *at(place)), one)
    assert student(two) == student(live)
    found = [RunDirectory(directory).read_summary()["val/loss"] for directory in (two, one)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
