"""Whole runs on rows with images: caches, rollouts, ranks, resumes. Some rows hold two images, some none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from deltakd.cache import make_cache
from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError, ServerError
from deltakd.io.run_directory import RunDirectory
from deltakd.references.serving.address import Address
from deltakd.references.serving.connection import ServerConnection
from deltakd.references.serving.secret import TOKEN_VARIABLE
from deltakd.training.run import run_training
from tests.distributed.processes import free_port, on_ranks
from tests.references.serving.servers import TOKEN, serving
from tests.rollouts.runs import assert_same_student, column, stop_after, weights
from tests.tiny import World
from tests.vision import FAMILIES, draw, save_vision_model, write_images

Train = Callable[..., RunDirectory]
ROLES = ("student", "teacher", "teacher_raw")
ON_POLICY = ("rollout=student", "rollout.decoding.max_new_tokens=4", "loss.ce_weight=0")
#: The others do what these do, and are tested in tests/models/test_images.py.
TWO = [pytest.param(family, marks=[] if family == "qwen2_5_vl" else pytest.mark.slow) for family in FAMILIES]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision_models")
    for family in FAMILIES:
        for seed, role in enumerate(ROLES):
            save_vision_model(root / f"{family}_{role}", seed=seed, family=family)
    return root


def on_images(models: Path, folder: Path, family: str = "qwen2_5_vl", roles: tuple[str, ...] = ROLES) -> list[str]:
    """Overrides of a run of three steps; twelve rows, some of text alone."""
    data = folder / "images.jsonl"
    source = str(data) if data.is_file() else write_images(folder / "images", 12, text_too=True)
    return [
        *(f"model.{role}.path={models / f'{family}_{role}'}" for role in roles),
        f"data.train={source}", "data.val=null", "data.template=chat", "data.max_length=200",
        "data.max_prompt_length=180", "data.batch_size=4", "trainer.max_steps=3", "optim.lr=0.003", "optim.eps=1e-4",
    ]  # fmt: skip


@pytest.mark.parametrize("store", ["hidden", "topk"])
@pytest.mark.parametrize("family", TWO)
def test_a_cache_serves_the_losses_of_live_references(
    family: str, store: str, models: Path, world: World, train: Train, tmp_path: Path
) -> None:
    chosen = on_images(models, tmp_path, family)
    topk = ["reference.store=topk", "reference.k=300"] if store == "topk" else []
    cache = tmp_path / "cache"
    made = make_cache(world.overrides(tmp_path / "unused", "delta_kd", *chosen, f"reference.path={cache}", *topk))
    assert made["rows"] == 12
    live = train("delta_kd", *chosen, name="live")
    cached = train("delta_kd", *chosen, "reference=cached", f"reference.path={cache}", name="cached")
    assert column(cached, "train/loss") == pytest.approx(column(live, "train/loss"), rel=1e-3 if topk else 1e-5)


def test_a_cache_of_other_images_or_of_another_processor_is_refused(
    models: Path, world: World, train: Train, tmp_path: Path
) -> None:
    """One image is drawn anew at its size; then the student comes with a processor for other sizes."""
    chosen = on_images(models, tmp_path)
    cache = ["reference=cached", f"reference.path={tmp_path / 'cache'}"]
    make_cache(world.overrides(tmp_path / "unused", "kd", *chosen, cache[1]))
    image = tmp_path / "images" / "4.png"
    with Image.open(image) as opened:
        size = opened.size
    draw(image, "black", size)
    with pytest.raises(ConfigError, match=r"lacks 1 of 12 rows of data.train \(rows 4\)"):
        train("kd", *chosen, *cache, name="drawn")
    other = save_vision_model(tmp_path / "of_larger_images", seed=0, family="qwen2_5_vl", pixels=112)
    with pytest.raises(ConfigError, match=r"the student's image processor is another one"):
        train("kd", *chosen, f"model.student.path={other}", *cache, name="other")


@pytest.mark.parametrize("family", TWO)
def test_the_student_answers_prompts_with_images(family: str, models: Path, train: Train, tmp_path: Path) -> None:
    """A killed run, with kept responses to train on again, makes the same student."""
    replay = ("rollout.replay.size=4", "rollout.replay.fresh=constant", "trainer.checkpoint_every_n_steps=1")
    chosen = [*on_images(models, tmp_path, family), *ON_POLICY, *replay, "trainer.max_steps=4"]
    whole = train("delta_opd", *chosen, name="whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(InterruptedError):
            train("delta_opd", *chosen, name="parts")
    assert_same_student(train("delta_opd", *chosen, "resume=true", name="parts"), whole)


def test_a_resumed_run_makes_the_same_student_and_notices_another_image(
    models: Path, train: Train, tmp_path: Path
) -> None:
    chosen = [*on_images(models, tmp_path, "idefics3"), "trainer.checkpoint_every_n_steps=1", "model/lora=default"]
    whole = train("kd", *chosen, name="whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(InterruptedError):
            train("kd", *chosen, name="parts")
    image = tmp_path / "images" / "2.png"
    content = image.read_bytes()
    draw(image, "black", (36, 48))
    with pytest.raises(ConfigError, match=r"data\.train"):
        train("kd", *chosen, "resume=true", name="parts")
    # The same content, written later, is the same data.
    image.write_bytes(content)
    assert_same_student(train("kd", *chosen, "resume=true", name="parts"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_serves_the_losses_of_live_references(
    family: str, models: Path, world: World, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, given and own responses; a server of text models, or of another processor, is refused."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    address = f"unix://{tmp_path / 'socket'}"
    chosen = on_images(models, tmp_path, family)
    served = ["reference=served", f"reference.url={address}"]
    own = ("loss.ce_weight=0.5", "rollout=student", "rollout.decoding.max_new_tokens=4")
    live = [train("delta_kd", *chosen, *more, name=f"live{len(more)}") for more in ((), own)]
    with serving(world.overrides(tmp_path / "server", "delta_kd", *chosen, *served)):
        for one, more in zip(live, ((), own), strict=True):
            assert_same_student(train("delta_kd", *chosen, *served, *more, name=f"served{len(more)}"), one)
        other = save_vision_model(tmp_path / "of_larger_images", seed=0, family=family, pixels=112)
        with pytest.raises(ConfigError, match="has another image processor for the student"):
            train("delta_kd", *chosen, *served, f"model.student.path={other}", name="larger")


@pytest.mark.slow
def test_a_server_of_two_processes_runs_rows_with_images(
    models: Path, world: World, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: such rows are not divided. Images that no model can read are refused, and the server lives on."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    address = f"unix://{tmp_path / 'socket'}"
    chosen = [*on_images(models, tmp_path, "qwen2_vl"), "trainer.accelerator=cpu"]
    served = ["reference=served", f"reference.url={address}", "reference.wait_s=300"]
    live = train("delta_kd", *chosen, name="live")
    overrides = world.overrides(tmp_path / "server", "delta_kd", *chosen, *served, "reference.sharding=shard")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    with (tmp_path / "server.log").open("w") as log:
        command = [*torchrun, "-m", "deltakd.serve", *overrides]
        server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    try:
        reached = ServerConnection(Address.parse(address, "url"), TOKEN.encode(), ["teacher"], 300)
        ids = torch.tensor([[5, 6, 7, 8]], dtype=torch.int32)
        mask = torch.ones(1, 4, dtype=torch.bool)
        rows = {"input_ids": ids, "attention_mask": mask, "trained": mask, "images.pixel_values": torch.ones(3, 5)}
        with pytest.raises(ServerError, match="refused a batch"):
            reached.take(reached.ask(rows))
        reached.close()
        assert_same_student(train("delta_kd", *chosen, *served, name="served"), live)
    finally:
        server.terminate()
        server.wait()


def _run(overrides: list[str], directory: Path) -> None:
    run_training(make_settings(compose_config("train", overrides)), directory)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_zero3"])
@pytest.mark.parametrize("options", [(), ON_POLICY])
def test_two_processes_are_one_where_only_some_rows_hold_images(
    strategy: str, options: tuple[str, ...], models: Path, world: World, tmp_path: Path
) -> None:
    """With one or two rows a micro-batch, a rank often has rows of text alone while the other reads images."""
    chosen = [*on_images(models, tmp_path), *options, "trainer.accelerator=cpu"]
    loss = "delta_opd" if options else "delta_kd"
    for ranks, more in ((1, []), (2, [f"strategy={strategy}"])):
        sizes = [f"trainer.devices={ranks}", f"data.batch_size={2 // ranks}"]
        directory = tmp_path / str(ranks)
        on_ranks(ranks, _run, world.overrides(directory, loss, *chosen, *sizes, *more), directory)
    one, two = (RunDirectory(tmp_path / name) for name in ("1", "2"))
    assert column(two, "train/loss") == pytest.approx(column(one, "train/loss"), rel=1e-4)
    first, second = weights(one), weights(two)
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-5)
