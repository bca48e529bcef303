"""Whole trainings on the student's own responses: what they learn, resumes, ranks, records, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.rollouts.samples import read_samples
from deltakd.training.announce import warn_of_own_labels
from deltakd.training.module import DistillationModule
from deltakd.types import Batch
from tests.rollouts.runs import ON_POLICY, assert_same_student, column, compare_ranks, stop_after
from tests.tiny import World, save_model

Train = Callable[..., RunDirectory]

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("opd", "exopd", "opd2", "minillm")]


@pytest.mark.parametrize("name", ["kd_reverse", "delta_opd", *SLOW])
def test_the_student_moves_to_its_target_on_its_own_responses(train: Train, sharp: list[str], name: str) -> None:
    many = ("data.batch_size=32", "rollout.per_prompt=4")
    run = train(name, *ON_POLICY, *sharp, "loss.ce_weight=0", "trainer.max_steps=20", *many)
    curve = column(run, "train/lost_shift" if name == "opd2" else "train/reverse_kl")
    assert len(curve) == 20
    assert sum(curve[-4:]) < sum(curve[:4]) - 0.1 * abs(sum(curve[:4]))
    assert all(0 < length <= 6 for length in column(run, "rollout/response_length"))
    assert all(0 <= part <= 1 for part in column(run, "rollout/finished_fraction"))
    entropy = column(run, "rollout/entropy")
    assert entropy == column(run, "train/ce" if name == "kd_reverse" else "train/entropy")
    if name != "kd_reverse":
        # The estimate from the sampled tokens is about the exact one.
        assert entropy == pytest.approx(column(run, "train/ce"), rel=0.15)
        assert all(spread > 0 for spread in column(run, "rollout/advantage_std"))
    assert bool(column(run, "train/teacher_kl")) == (name in ("delta_opd", "exopd", "opd2"))
    for half in ("rollout", "train"):
        assert all(rate > 0 for rate in column(run, f"{half}/tokens_per_second"))


def test_some_responses_are_kept_as_text(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    run = train("kd", *ON_POLICY, "loss.ce_weight=0", "trainer.val_every_n_steps=2", "trainer.max_steps=3")
    assert "Give loss.ce_weight=0." not in caplog.text
    totals = run.read_summary()["meta"]["rollouts"]
    assert totals["tokens"] == round(4 * sum(column(run, "rollout/response_length")))
    assert totals["seconds"] > 0
    samples = read_samples(run.path)
    assert list(samples) == [2, 3]
    for records in samples.values():
        assert len(records) == 4
        for record in records:
            assert record["prompt"].endswith(">")
            assert 1 <= record["output_tokens"] <= 6
            assert record["finished"] or record["output_tokens"] == 6


def test_prompts_are_those_of_the_data_and_responses_are_not(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[Batch] = []
    original = DistillationModule.training_step

    def keeping(module: DistillationModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        batches.append(batch)
        return original(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "training_step", keeping)
        train("sft", *ON_POLICY, name="own")
        own, batches = batches, []
        train("sft", "data.val=null", "trainer.max_epochs=2", "trainer.max_steps=20", name="given")
    prompts = {
        int(row): ids[: int((labels != -100).nonzero()[0])].tolist()
        for batch in batches
        for row, ids, labels in zip(batch.row_ids, batch.input_ids, batch.labels, strict=True)
    }
    assert len(own) == 6
    for batch in own:
        for row, ids, labels in zip(batch.row_ids, batch.input_ids, batch.labels, strict=True):
            assert ids[: int((labels != -100).nonzero()[0])].tolist() == prompts[int(row)]
        assert batch.step_tokens == len(batch.valid_N)


@pytest.mark.parametrize("options", [("rollout.every=1",), ("rollout.every=3",)])
def test_a_killed_run_makes_the_same_student(
    train: Train, sharp: list[str], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Stopped in the middle of a round where it serves three steps: bitwise the same losses and student."""
    chosen = (*ON_POLICY, *sharp, *options, "trainer.max_steps=6", "trainer.checkpoint_every_n_steps=1")
    whole = train("delta_opd", *chosen, name="whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(InterruptedError):
            train("delta_opd", *chosen, name="parts")
    parts = train("delta_opd", *chosen, "resume=true", name="parts")
    assert column(parts, "train/loss") == column(whole, "train/loss")
    students = [load_file(run.student / "model.safetensors") for run in (whole, parts)]
    assert all(torch.equal(students[0][key], students[1][key]) for key in students[0])


@pytest.mark.slow
def test_a_static_cache_makes_the_same_student_and_answers(train: Train, sharp: list[str], world: World) -> None:
    asked = ("evaluation=default", f"evaluation.sets={{mine: {world.root / 'test.jsonl'}}}", "evaluation.seeds=[3]")
    short = ("evaluation.decoding.max_new_tokens=6", "evaluation.val_limit=2", "trainer.max_steps=3")
    chosen = (*ON_POLICY, *sharp, *asked, *short)
    growing = train("delta_opd", *chosen, name="growing")
    static = train("delta_opd", *chosen, "rollout.static_cache=true", "evaluation.static_cache=true", name="static")
    assert column(static, "train/loss") == pytest.approx(column(growing, "train/loss"), rel=1e-6)
    answers = [(run.path / "generations" / "mine_seed3.jsonl").read_text() for run in (growing, static)]
    assert answers[0] == answers[1]


REPLAY = ("rollout.replay.size=4", "rollout.replay.fresh=constant")


@pytest.mark.parametrize("options", [(), pytest.param(REPLAY, marks=pytest.mark.slow)])
def test_a_student_s_dropout_is_off_where_its_samples_are_judged(
    train: Train, sharp: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, options: tuple[str, ...]
) -> None:
    """The student with dropout learns as its twin without, and keeps its rate in the export."""
    caplog.set_level("INFO")
    twin = save_model(tmp_path / "plain", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    chosen = (*ON_POLICY, *sharp, *options, "trainer.max_steps=3")
    run = train("opd", *chosen)
    assert "The student's dropout (up to 0.1) is off" in caplog.text
    assert json.loads((run.student / "config.json").read_text())["resid_pdrop"] == 0.1
    caplog.clear()
    assert_same_student(run, train("opd", *chosen, f"model.student.path={twin}", name="twin"))
    assert "dropout" not in caplog.text


@pytest.mark.parametrize(
    ("loss", "options", "said"),
    [
        ("kd", (), "it only adds noise. Give loss.ce_weight=0."),
        ("sft", (), "it teaches nothing. Give rollout=none"),
        ("kd", ("loss.ce_weight=0",), None),
        ("kd", ("rollout.source=mixture",), None),
        ("kd", ("rollout.decoding.temperature=0.5",), None),
        ("dpkd", (), None),
    ],
)
def test_the_cross_entropy_of_own_samples_is_warned_of(
    world: World,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    loss: str,
    options: tuple[str, ...],
    said: str | None,
) -> None:
    settings = make_settings(compose_config("train", world.overrides(tmp_path / "run", loss, *ON_POLICY, *options)))
    warn_of_own_labels(settings.loss, settings.rollout)
    assert (said in caplog.text) if said else not caplog.text


def test_rounds_have_the_gradients_of_single_steps(train: Train, sharp: list[str], tmp_path: Path) -> None:
    student = save_model(tmp_path / "plain", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    frozen = [*ON_POLICY, *sharp, f"model.student.path={student}", "optim.lr=1e-9", "trainer.max_steps=2"]
    always = column(train("opd", *frozen, name="always"), "train/grad_norm")
    rounds = column(train("opd", *frozen, "rollout.every=2", name="rounds"), "train/grad_norm")
    assert rounds == pytest.approx(always, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_zero3"])
@pytest.mark.parametrize("options", [(), ("rollout.every=2", "rollout.per_prompt=2")])
def test_two_processes_are_one(
    world: World, sharp: list[str], tmp_path: Path, strategy: str, options: tuple[str, ...]
) -> None:
    """Dropout is off, since each rank draws its own; responses, losses and students are those of one process."""
    student = save_model(tmp_path / "plain", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    chosen = (*ON_POLICY, *sharp, *options, f"model.student.path={student}")
    compare_ranks(world, tmp_path, "delta_opd", chosen, [f"strategy={strategy}"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_two_processes_share_rows_of_data_and_student(
    world: World, sharp: list[str], tmp_path: Path, strategy: str
) -> None:
    student = save_model(tmp_path / "plain", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    chosen = (*ON_POLICY, *sharp, "rollout.fraction=0.5", f"model.student.path={student}")
    compare_ranks(world, tmp_path, "delta_kd", chosen, [f"strategy={strategy}"])


@pytest.mark.parametrize(
    ("loss", "options", "said"),
    [
        ("opd", (), "the loss learns from tokens that the student sampled, and rollout.fraction is 0"),
        ("minillm", (), "the loss learns from tokens that the student sampled, and rollout.fraction is 0"),
        ("kd", ("rollout=student", "rollout.decoding.temperature=-1"), "rollout.decoding.temperature is -1"),
        ("opd", ("rollout=student", "rollout.fraction=0.5"), "rollout.fraction is 0.5; give rollout=student"),
        ("opd", ("rollout=student", "rollout.decoding.top_p=0.9"), "rollout.decoding changes it"),
        ("opd", ("rollout=student", "rollout.decoding.no_repeat_ngram_size=3"), "rollout.decoding changes it"),
        (
            "kd",
            ("rollout=student", "rollout.fraction=0", "rollout.source=mixture"),
            "rollout.source=mixture would have no effect: rollout.fraction is 0",
        ),
        (
            "kd",
            ("rollout=student", "rollout.fraction=0", "rollout.engine=vllm", "rollout.vllm.url=http://127.0.0.1:1"),
            "rollout.engine=vllm would have no effect",
        ),
        (
            "kd",
            ("rollout=student", "rollout.fraction=0", "rollout.static_cache=true"),
            "rollout.static_cache=true would have no effect",
        ),
        (
            "kd",
            ("rollout=student", "rollout.static_cache=true", "rollout.engine=vllm"),
            "rollout.static_cache=true is for rollout.engine=own",
        ),
        ("kd", ("rollout=student", "rollout.decoding.temperature=0"), "rollout.decoding.temperature is 0"),
        ("kd", ("rollout=student", "rollout.fraction=1.5"), "rollout.fraction is 1.5"),
        ("kd", ("rollout=student", "rollout.per_prompt=2", "rollout.fraction=0.5"), "rollout.per_prompt is 2"),
        ("kd", ("rollout=student", "rollout.per_prompt=2", "rollout.decoding.do_sample=false"), "are the same"),
        ("kd", ("rollout=student", "reference=cached", "reference.path=x"), "holds the references over the data's"),
        (
            "kd",
            ("rollout=student", "data.batch_size=null", "data.max_tokens_per_batch=500"),
            "give data.batch_size, or rollout=none",
        ),
        (
            "sft",
            ("rollout=student", "data=text"),
            "so the student answers prompts, and data is plain text",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(
    world: World, tmp_path: Path, loss: str, options: tuple[str, ...], said: str
) -> None:
    chosen = [
        o for o in world.overrides(tmp_path / "run", loss, *options) if not ("data=text" in options and "val" in o)
    ]
    with pytest.raises(ConfigError) as caught:
        make_settings(compose_config("train", chosen))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("rollout.per_prompt=3", r"4 rows, which is not a multiple of rollout\.per_prompt = 3"),
        ("rollout.fraction=0.1", r"0\.1 of 4 rows a step, less than half a row"),
    ],
)
def test_a_step_that_responses_cannot_fill_is_refused_before_data_is_read(
    train: Train, monkeypatch: pytest.MonkeyPatch, option: str, said: str
) -> None:
    monkeypatch.delattr("deltakd.training.assembly.open_tokenizer")
    with pytest.raises(ValueError, match=said):
        train("sft", *ON_POLICY, option)


def test_rows_need_no_response(train: Train, world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts alone, and conversations that end with the user; one with answers is answered at its last turn."""
    turns = [("user", "one two"), ("assistant", "three"), ("user", "four five")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = [{"prompt": f"one two {n}>"} for n in range(6)] + [{"messages": messages}] * 2
    file = world.root / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO"):
        run = train("kd", *ON_POLICY, f"data.train={file}", "trainer.max_steps=2")
    assert len(column(run, "train/loss")) == 2
    assert "8 prompts, which the student answers" in caplog.text
    assert "Give loss.ce_weight=0." in caplog.text
    assert re.search(r"The first prompt that the student answers \(row 0, \d+ tokens\):\none two 0>", caplog.text)
    with pytest.raises(ValueError, match="response"):
        train("kd", "data.val=null", f"data.train={file}", name="given")


def test_prompts_that_fill_the_context_are_refused_or_cut(train: Train, world: World) -> None:
    """The longest prompt leaves room for a token; longer ones are cut to it, and the count is kept."""
    with pytest.raises(ValueError, match="the prompt must leave room for a response"):
        train("sft", *ON_POLICY, "data.max_prompt_length=120")
    file = world.root / "long.jsonl"
    file.write_text("".join(json.dumps({"prompt": "red blue " * 60 + ">"}) + "\n" for _ in range(4)))
    run = train("kd", *ON_POLICY, f"data.train={file}", "data.max_prompt_length=119", "trainer.max_steps=2", name="cut")
    assert column(run, "rollout/response_length") == [1.0, 1.0]
    assert run.read_summary()["meta"]["data"]["train/cut_prompts"] == 4
