"""Whole runs whose teachers have a tokenizer of their own."""

from __future__ import annotations

import csv
import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltakd.config.build import make_caching_settings, make_settings
from deltakd.config.compose import compose_config
from deltakd.config.instantiate import built
from deltakd.evaluate import run_evaluation
from deltakd.io.errors import ConfigError, Stopped
from deltakd.io.run_directory import RunDirectory
from deltakd.models.tokenizers import ALIGNING_LOSSES, OtherTokenizerError
from deltakd.training.caching import fill_cache
from deltakd.training.callbacks import StopOnSignal
from deltakd.training.run import run_training
from tests.distributed.processes import on_ranks
from tests.tiny import World, make_rows, save_foreign_teachers, save_model, write_rows

Train = Callable[..., RunDirectory]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that give the world's student teachers with another tokenizer, whose EOS has another name."""
    return save_foreign_teachers(tmp_path_factory.mktemp("foreign"))


def weights(directory: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(directory.student / "model.safetensors")


def same(ours: RunDirectory, theirs: RunDirectory) -> bool:
    return all(torch.equal(value, weights(theirs)[name]) for name, value in weights(ours).items())


@pytest.mark.parametrize("loss", ALIGNING_LOSSES)
def test_every_loss_that_aligns_trains_a_student_on_a_teacher_with_another_tokenizer(
    loss: str, train: Train, foreign: tuple[str, ...]
) -> None:
    run = train(loss, *foreign, "trainer.max_steps=3")
    summary = run.read_summary()
    assert summary["data/aligned_fraction"] == 1.0
    with (run.path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert all(0 < float(row["train/loss"]) < 20 and float(row["data/aligned_fraction"]) == 1 for row in rows)
    assert summary["meta"]["data"]["train/cut_others"] == 0


def test_a_cache_of_hidden_states_gives_the_run_that_live_references_give(
    train: Train, world: World, foreign: tuple[str, ...], tmp_path: Path
) -> None:
    live = train("delta_span", *foreign, name="live")
    reference = ("reference=cached", f"reference.path={tmp_path / 'cache'}", "reference.store=hidden")
    config = compose_config("train", world.overrides(tmp_path / "none", "delta_span", *foreign, *reference))
    made = fill_cache(make_caching_settings(config))
    assert set(made["models"]) == {"teacher", "teacher_raw", "student_raw"}
    cached = train("delta_span", *foreign, *reference, name="cached")
    assert same(live, cached)
    assert cached.read_summary()["val/loss"] == live.read_summary()["val/loss"]
    with pytest.raises(ConfigError, match=r"data.teacher_template is .*, but the cache .* was made with"):
        train("delta_span", *foreign, *reference, "data.teacher_template=alpaca", name="other")
    topk = (*reference[:1], f"reference.path={tmp_path / 'topk'}", "reference.store=topk")
    with pytest.raises(ConfigError, match=r"it compares two vocabularies, which log-probs of a few tokens can't give"):
        make_caching_settings(compose_config("train", world.overrides(tmp_path, "delta_span", *foreign, *topk)))


def test_a_resumed_run_of_two_tokenizers_is_bitwise_the_uninterrupted_one(
    train: Train, foreign: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*foreign, "trainer.accumulate_grad_batches=2", "trainer.checkpoint_every_n_steps=1")
    whole = train("span_kd", *options, name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_train_batch_end", _stop_after(3))
        with pytest.raises(Stopped):
            train("span_kd", *options, name="halted")
    resumed = train("span_kd", *options, "resume=true", name="halted")
    assert same(whole, resumed)
    assert {k: v for k, v in whole.read_summary().items() if k != "meta"} == {
        k: v for k, v in resumed.read_summary().items() if k != "meta"
    }


def _stop_after(step: int) -> Any:
    def stop(_: StopOnSignal, trainer: Any, *__: Any) -> None:
        if trainer.global_step >= step:
            raise Stopped(signal.SIGTERM, trainer.global_step)

    return stop


FSDP = ("fsdp", "reference.sharding=shard")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "strategy"),
    [
        ("span_kd", ("ddp",)),
        ("span_kd", FSDP),
        ("dskd", ("ddp",)),
        ("dskd", FSDP),
        ("dskd", ("deepspeed_zero2",)),
        ("dskd", ("deepspeed_zero3",)),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_two_ranks_train_on_what_one_does(
    loss: str, strategy: tuple[str, ...], world: World, foreign: tuple[str, ...], tmp_path: Path
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    # Each rank draws its own dropout.
    plain = save_model(tmp_path / "plain", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shared = (*foreign, f"model.student.path={plain}", "trainer.accelerator=cpu", "data.val=null", "optim.lr=0.001")
    split = (f"strategy={strategy[0]}", *strategy[1:], "trainer.devices=2", "data.batch_size=2")
    on_ranks(2, _train, world.overrides(two, loss, *shared, *split), two)
    _train(world.overrides(one, loss, *shared, "data.batch_size=4"), one)
    records = []
    for directory in (two, one):
        with (directory / "metrics.csv").open() as file:
            records.append([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert len(records[0]) == 6
    assert records[0] == pytest.approx(records[1], rel=1e-4)


def _train(overrides: list[str], directory: Path) -> None:
    run_training(make_settings(compose_config("train", overrides)), directory)


def _train_halfway(overrides: list[str], directory: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
        patch.setattr(StopOnSignal, "on_train_batch_end", _stop_after(3))
        _train(overrides, directory)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [FSDP, ("deepspeed_zero3",)], ids=["fsdp", "deepspeed_zero3"])
def test_projectors_of_two_ranks_go_on_where_they_were(
    strategy: tuple[str, ...], world: World, foreign: tuple[str, ...], tmp_path: Path
) -> None:
    chosen = (*foreign, f"strategy={strategy[0]}", *strategy[1:], "trainer.accelerator=cpu", "trainer.devices=2")
    chosen = (*chosen, "data.val=null", "trainer.checkpoint_every_n_steps=1")
    whole, parts = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "parts")
    on_ranks(2, _train, world.overrides(whole.path, "dskd", *chosen), whole.path)
    on_ranks(2, _train_halfway, world.overrides(parts.path, "dskd", *chosen), parts.path)
    on_ranks(2, _train, world.overrides(parts.path, "dskd", *chosen, "resume=true"), parts.path)
    assert same(whole, parts)


def test_streamed_rows_are_aligned_as_indexed_ones(train: Train, foreign: tuple[str, ...], tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", make_rows(30, 5))
    options = (*foreign, f"data.train={tmp_path / 'rows.jsonl'}", "data.streaming=true", "data.shuffle_buffer=20")
    run = train("span_kd", *options, "trainer.val_every_n_steps=3")
    assert run.read_summary()["data/aligned_fraction"] == 1.0


def test_the_student_is_measured_against_the_teacher_over_spans_alone(
    train: Train, world: World, foreign: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    sets = f"evaluation.sets={{mine: {world.root}/test.jsonl}}"
    with caplog.at_level(logging.INFO):
        run = train("span_kd", *foreign, sets, "evaluation=default", "evaluation.measures.rows=8")
    summary = run.read_summary()
    for name in ("val", "mine"):
        assert summary[f"{name}/span_kl_teacher"] > 0
        assert summary["meta"]["measured"][name]["spans"] > 0
        assert summary[f"{name}/perplexity"] > 1
        assert f"{name}/kl_teacher" not in summary
        assert f"{name}/shift_correlation" not in summary
        assert summary[f"{name}/kl_raw_student"] > 0
    assert "kl_teacher, top1_agreement and shift_correlation need one vocabulary and are left out" in caplog.text
    again = run_evaluation([f"run={run.path}", f"run_dir={run.path.parent / 'again'}"])
    for name in ("val", "mine"):
        assert again[f"{name}/span_kl_teacher"] == pytest.approx(summary[f"{name}/span_kl_teacher"], rel=1e-6)


def test_rows_that_the_teachers_can_hold_in_part_are_counted(train: Train, foreign: tuple[str, ...]) -> None:
    run = train("span_kd", *foreign, "data.teacher_max_length=60")
    summary = run.read_summary()
    assert 0 < summary["data/aligned_fraction"] < 1
    assert summary["meta"]["data"]["train/cut_others"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("loss=kd",),
            r"the teacher has another tokenizer .* a loss that aligns tokens \(uld, dskd, span_kd, delta_sp",
        ),
        (("loss=delta_span", "model.teacher_raw.path=OWN"), "have another tokenizer than the student, and teacher_raw"),
        (("rollout=student", "rollout.source=mixture"), "the teachers have another tokenizer and can't vote on the"),
        (("rollout=student", "loss=opd"), r"the teacher has another tokenizer .* a loss that aligns tokens \(uld"),
    ],
)
def test_what_two_tokenizers_can_not_do_is_refused_by_name(
    overrides: tuple[str, ...], message: str, world: World, foreign: tuple[str, ...], tmp_path: Path
) -> None:
    given = [one.replace("OWN", str(world.root / "teacher_raw")) for one in (*foreign, *overrides)]
    chosen = world.overrides(tmp_path / "run", "span_kd", *given)
    with pytest.raises((ConfigError, OtherTokenizerError), match=message):
        run_training(make_settings(compose_config("train", chosen)), tmp_path / "run")


def test_tokenizers_that_do_not_go_together_are_told_with_the_other_problems(
    world: World, foreign: tuple[str, ...], tmp_path: Path
) -> None:
    wrong = ("optim.lr=-1", "data.max_prompt_length=200")
    for given, said in (
        (("loss=kd",), "the teacher has another tokenizer than the student"),
        (("rollout=student", "rollout.source=mixture"), r"can't vote on the student's tokens"),
    ):
        chosen = world.overrides(tmp_path / "run", "span_kd", *foreign, *wrong, *given)
        with pytest.raises(ConfigError, match=said) as caught:
            make_settings(compose_config("train", chosen))
        assert len(caught.value.problems) >= 3


def test_packed_rows_train_as_padded_ones(train: Train, foreign: tuple[str, ...], tmp_path: Path) -> None:
    # Dropout falls on other positions.
    plain = save_model(tmp_path / "plain", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shared = (*foreign, f"model.student.path={plain}", "trainer.max_steps=3")
    runs = [train("span_kd", *shared, f"data.packing={packing}", name=str(packing)) for packing in (True, False)]
    losses = [run.read_summary()["val/loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_plain_text_and_idle_settings_are_refused(train: Train, world: World, foreign: tuple[str, ...]) -> None:
    text = ("data=text", f"data.train={world.root / 'train.jsonl'}", "data.val=null", "data.max_length=60")
    drop = ("data.template", "data.max_prompt_length")
    with pytest.raises(ValueError, match="data is plain text, whose blocks"):
        train("span_kd", *foreign, *text, "+data.columns={text: instruction}", drop=drop, name="text")
    with pytest.raises(ConfigError, match=r"data.teacher_max_length is 60, but all models of this run share one token"):
        train("span_kd", "data.teacher_max_length=60", name="idle")
    # A baseline that reads no teacher has the settings of the methods beside it.
    train("sft", *foreign, "data.teacher_max_length=60", "trainer.max_steps=1", name="baseline")


def test_the_losses_that_the_refusal_names_align() -> None:
    for name in ALIGNING_LOSSES:
        config = compose_config("train", [f"loss={name}", "model.student.path=x", "data.train=x"])
        assert built(config["loss"], "loss", []).needs_alignment
