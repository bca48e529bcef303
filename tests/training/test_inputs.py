"""A resumed run must read what it began with; what it says of its precision."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models.export_check import ExportCheck
from deltakd.training.half_precision import rounding_warning
from deltakd.training.inputs import INPUTS, changed_inputs, check_inputs, read_inputs
from deltakd.training.run import run_training
from tests.tiny import World, make_rows, make_tokenizer, make_world, save_model, write_rows

Train = Callable[..., RunDirectory]


@pytest.fixture
def own(tmp_path: Path) -> World:
    """A world that may be changed."""
    (tmp_path / "world").mkdir()
    return make_world(tmp_path / "world")


def start(world: World, loss: str, *extra: str) -> RunDirectory:
    directory = world.root.parent / "run"
    run_training(make_settings(compose_config("train", world.overrides(directory, loss, *extra))), directory)
    return RunDirectory(directory)


def change(world: World, what: str) -> None:
    if what == "data.train":
        write_rows(world.root / "train.jsonl", [*make_rows(39, 1), *make_rows(1, 7)])
    elif what == "data.val":
        write_rows(world.root / "val.jsonl", make_rows(8, 5))
    else:
        role = what.removeprefix("model.")
        path = world.root / ("student_raw" if role == "student" else role)
        shutil.rmtree(path)
        save_model(path, seed=9, width=16 if role == "student" else 24)


@pytest.mark.parametrize("what", ["data.train", "data.val", "model.student", "model.teacher", "model.teacher_raw"])
def test_an_input_that_changed_since_is_refused_by_name(what: str, own: World) -> None:
    run = start(own, "delta_kd")
    run.summary.unlink()
    before = json.loads((run.path / INPUTS).read_text())
    start(own, "delta_kd", "resume=true")
    assert json.loads((run.path / INPUTS).read_text()) == before
    run.summary.unlink()
    change(own, what)
    # With student_raw, the student's path is that of two roles.
    with pytest.raises(
        ConfigError,
        match=rf"{re.escape(what)}: (the rows|its files) are others than when this run began "
        r"\([0-9a-f]{12} there, [0-9a-f]{12} now\); put back .* resume=force",
    ):
        start(own, "delta_kd", "resume=true")
    assert not run.finished
    assert json.loads((run.path / INPUTS).read_text()) == before
    meta = start(own, "delta_kd", "resume=force").read_summary()["meta"]
    assert any(sentence.startswith(f"{what}: ") for sentence in meta["changed_inputs"])
    # What was accepted once is the run's from then on, and is still told.
    run.summary.unlink()
    assert start(own, "delta_kd", "resume=true").read_summary()["meta"]["changed_inputs"] == meta["changed_inputs"]


def test_everything_that_changed_is_told_at_once(own: World) -> None:
    run = start(own, "kd")
    assert run.read_summary()["meta"]["changed_inputs"] == []
    run.summary.unlink()
    for what in ("data.train", "model.teacher", "model.teacher_raw"):
        change(own, what)
    with pytest.raises(ConfigError) as caught:
        start(own, "kd", "resume=true")
    # The raw teacher is not read by this loss.
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["data.train", "model.teacher"]


def test_what_can_not_be_told_is_not_compared(tmp_path: Path) -> None:
    check_inputs(tmp_path, {"model.teacher": None, "data.train": "a" * 64}, force=False)
    check_inputs(tmp_path, {"model.teacher": "b" * 64, "data.train": "a" * 64}, force=False)
    check_inputs(tmp_path, {"model.teacher": None, "data.train": "a" * 64}, force=False)
    with pytest.raises(ConfigError, match=r"model.teacher: its files are others .*\(b{12} there, c{12} now\)"):
        check_inputs(tmp_path, {"model.teacher": "c" * 64}, force=False)
    assert changed_inputs(tmp_path) == changed_inputs(tmp_path / "nowhere") == []


def test_a_cache_is_told_by_what_it_holds_not_by_where_its_models_lay() -> None:
    def reference(path: str, **changed: Any) -> str | None:
        model = {"path": path, "sha256": "a" * 64, "stored_dtype": "float16"}
        content = {
            "store": "topk",
            "vocabulary": 280,
            "k": 8,
            "temperature": 1.0,
            "models": {"teacher": model},
        } | changed
        given: Any = (SimpleNamespace(specs={}), make_tokenizer(), SimpleNamespace(train=rows, val=None))
        return read_inputs(*given, cast(Any, SimpleNamespace(content=content)))["reference"]

    rows = SimpleNamespace(fingerprint="b" * 64)
    assert reference("here") == reference("there")
    assert reference("here") != reference("here", k=16)
    assert reference("here") != reference("here", models={"teacher": {"path": "here", "sha256": "c" * 64}})


def test_resume_is_true_false_or_force(train: Train) -> None:
    with pytest.raises(ConfigError, match="resume is 'always'; it must be true or false or force"):
        train("sft", "resume=always")


def test_an_export_that_is_another_student_does_not_finish_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ExportCheck.check

    def spoilt(self: ExportCheck, trained: nn.Module, tokenizer: object, directory: Path) -> None:
        weights = directory / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-4000:] = bytes(4000)
        weights.write_bytes(content)
        original(self, trained, tokenizer, directory)  # type: ignore[arg-type]

    monkeypatch.setattr(ExportCheck, "check", spoilt)
    with pytest.raises(ValueError, match=r"its logits differ by up to .*the same command with resume=true"):
        train("sft")
    monkeypatch.undo()
    run = train("sft", "resume=true")
    assert run.finished
    assert (run.checkpoints / "last.ckpt").is_file()


def test_a_run_with_an_adapter_on_a_tied_head_ends_with_the_student_that_it_trained(train: Train) -> None:
    run = train("sft", "model/lora=default", "model.lora.target_modules=[lm_head,wte,c_attn]")
    assert json.loads((run.student / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["model.student.dtype=bfloat16", "optim.lr=1e-5"], True),
        (["trainer.precision=bf16-true", "optim.lr=1e-5"], True),
        (["model.student.dtype=bfloat16", "optim.lr=1e-3"], False),
        (["trainer.precision=bf16-mixed", "optim.lr=1e-5"], False),
        # peft keeps the adapter, which alone is trained, in float32.
        (["model.student.dtype=bfloat16", "optim.lr=1e-5", "model/lora=default"], False),
    ],
)
def test_updates_that_bfloat16_would_lose_are_warned_of(
    overrides: list[str], warned: bool, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "deltakd"):
        train("sft", "trainer.max_steps=2", *overrides)
    said = [r.getMessage() for r in caplog.records if "model.student.dtype=float32" in r.getMessage()]
    assert bool(said) == warned
    if warned:
        assert said[0].startswith(
            "the student's weights are bfloat16, and with optim.lr=1e-05 most updates are too small"
        )


def test_the_warning_is_of_updates_that_are_lost() -> None:
    """Twenty steps of AdamW on weights of a usual size: where it warns, most bfloat16 weights stay as they were."""
    moved = {}
    for lr in (1e-5, 3e-3):
        weight = nn.Parameter(torch.randn(2000, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16())
        before = weight.detach().clone()
        optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0)
        for step in range(20):
            weight.grad = torch.randn(2000, generator=torch.Generator().manual_seed(step + 1)).bfloat16()
            optimizer.step()
        moved[lr] = (weight != before).float().mean().item()
        assert (rounding_warning([weight], lr) is not None) == (lr < 1e-4)
    assert moved[1e-5] < 0.5 < 0.9 < moved[3e-3]
