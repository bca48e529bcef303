"""Whole runs on tiny models, in this process."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError, NonFiniteLossError
from deltakd.io.files import read_json_lines
from deltakd.io.run_directory import RunDirectory
from deltakd.training.module import DistillationModule
from deltakd.training.run import run_training
from deltakd.training.step import DistillationStep
from deltakd.types import Batch
from tests.tiny import World, make_rows, make_tokenizer, save_model, write_rows

Train = Callable[..., RunDirectory]
SETS = "evaluation.sets={{mine: {}}}"


def weights(run: RunDirectory) -> dict[str, Tensor]:
    return load_file(run.student / "model.safetensors")


def losses(run: RunDirectory) -> list[float]:
    with (run.path / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("loss", ["sft", "kd", "delta_kd"])
def test_a_run_leaves_what_it_promises(train: Train, world: World, loss: str) -> None:
    run = train(
        loss,
        "trainer.max_steps=12",
        "evaluation=default",
        SETS.format(world.root / "test.jsonl"),
        "evaluation.seeds=[10,20]",
        "evaluation.val_limit=4",
    )
    curve = losses(run)
    assert len(curve) == 12
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])
    summary = run.read_summary()
    for key in ("val/loss", "val/rougeL", "mine/rougeL", "mine/rougeL_stderr", "mine/exact_match"):
        assert math.isfinite(summary[key])
    meta = summary["meta"]
    assert meta["steps"] == 12
    assert meta["seed"] == 0
    roles = {"sft": 1, "kd": 2, "delta_kd": 4}[loss]
    assert len(meta["parameters"]) == roles
    for key in ("git_commit", "packages", "device", "valid_tokens", "seconds", "tokens_per_second", "peak_memory_mib"):
        assert key in meta
    for seed in (10, 20):
        records = read_json_lines(run.generations / f"mine_seed{seed}.jsonl")
        assert records is not None
        assert len(records) == 6
        assert records[0]["decoding"]["seed"] == seed
    model = AutoModelForCausalLM.from_pretrained(run.student)
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert "delta_weight" in (run.student / "README.md").read_text()
    checkpoint = torch.load(run.checkpoints / "last.ckpt", weights_only=True)
    assert all(name.startswith("step.student.") for name in checkpoint["state_dict"])
    assert meta["parameters"]["student"] == sum(p.numel() for p in model.parameters())


def test_identity_1_alpha_zero_is_kd_bitwise(train: Train) -> None:
    kd = train("kd", name="kd")
    zero = train("delta_kd", "delta_weight=0", "model.teacher_raw.path=null", name="zero")
    assert same(weights(kd), weights(zero))
    assert losses(kd) == losses(zero)
    assert set(zero.read_summary()["meta"]["parameters"]) == {"student", "teacher"}


def test_identity_2_and_3_on_models(train: Train, world: World) -> None:
    """Equal raw models: delta is KD. A teacher that did not move, at α = 1: the target is the raw student."""
    raw = f"model.teacher_raw.path={world.root / 'student_raw'}"
    torch.testing.assert_close(
        losses(train("delta_kd", raw, name="a")), losses(train("kd", name="b")), rtol=1e-5, atol=0
    )
    still = f"model.teacher.path={world.root / 'teacher_raw'}"
    run = train("delta_kd", still, "loss.ce_weight=0", "trainer.max_steps=1", "optim.lr=1e-9", name="c")
    # The student starts as the raw student: on validation data (no dropout) it is at its target already.
    assert abs(run.read_summary()["val/forward_kl"]) < 1e-6


@pytest.mark.parametrize("loss", ["sft", "delta_kd"])
def test_identity_16_accumulation_changes_nothing(train: Train, world: World, loss: str, tmp_path: Path) -> None:
    """One micro-batch of 8, or 8 of 1: same losses and parameters (rows of unequal length, no dropout)."""
    student = save_model(tmp_path / "no_dropout", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    base = (loss, f"model.student.path={student}", "trainer.max_steps=4", "optim.lr=0.001", "optim.eps=1e-4")
    one = train(*base, "data.batch_size=8", name="one")
    eight = train(*base, "data.batch_size=1", "trainer.accumulate_grad_batches=8", name="eight")
    torch.testing.assert_close(losses(one), losses(eight), rtol=1e-5, atol=0)
    a, b = weights(one), weights(eight)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_dropout_is_on_in_the_student_and_off_in_the_references(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: dict[str, set[bool]] = {"student": set(), "references": set()}
    original = DistillationModule.training_step

    def spy(module: DistillationModule, batch: Batch, batch_idx: int) -> Tensor:
        modes["student"].add(module.student.training)
        references = module.step.references
        modes["references"] |= {model.training for model in references._models.values()}
        return original(module, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", spy)
    train("delta_kd", "trainer.max_steps=3", "trainer.val_every_n_steps=1")
    assert modes == {"student": {True}, "references": {False}}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(train: Train, precision: str) -> None:
    curve = losses(
        train("delta_kd", f"trainer.precision={precision}", "model.teacher.dtype=bfloat16", "trainer.max_steps=8")
    )
    assert curve[-1] < curve[0]


def test_lora_student_and_its_raw_self(train: Train, world: World) -> None:
    run = train("delta_kd", "model/lora=default", "model.lora.r=2", "trainer.max_steps=3", "optim.lr=1e-9")
    assert set(run.read_summary()["meta"]["parameters"]) == {"student", "teacher", "teacher_raw"}
    merged = AutoModelForCausalLM.from_pretrained(run.student)
    raw = AutoModelForCausalLM.from_pretrained(world.root / "student_raw")
    ids = torch.arange(2, 9)[None]
    torch.testing.assert_close(merged(ids).logits, raw(ids).logits, rtol=1e-4, atol=1e-5)
    full = train("delta_kd", "optim.lr=1e-9", "trainer.max_steps=1", name="full")
    # With nothing learnt yet, the adapter switched off is the separate raw student.
    assert run.read_summary()["val/loss"] == pytest.approx(full.read_summary()["val/loss"], rel=1e-5)
    learnt = train("delta_kd", "model/lora=default", "trainer.max_steps=8", "optim.lr=0.03", name="learnt")
    assert losses(learnt)[-1] < losses(learnt)[0]
    assert not same(weights(learnt), weights(run))


def test_gradient_checkpointing_changes_no_number(train: Train) -> None:
    plain = train("kd", name="plain")
    checkpointed = train("kd", "model.gradient_checkpointing=true", name="checkpointed")
    torch.testing.assert_close(losses(plain), losses(checkpointed), rtol=1e-6, atol=0)


def test_pretraining_from_scratch_on_text(train: Train, world: World, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(" ".join(row.values()) for row in make_rows(120, 5)))
    run = train(
        "sft",
        "data=text",
        f"data.train={text}",
        f"data.val={text}",
        "data.max_length=32",
        "model.student={path:null,init:random,architecture:{model_type:gpt2,n_embd:16,n_layer:1,n_head:2,n_positions:64}}",
        f"model.tokenizer.train_on={text}",
        "model.tokenizer.vocabulary=300",
        "trainer.max_steps=20",
    )
    assert losses(run)[-1] < losses(run)[0]
    assert AutoTokenizer.from_pretrained(run.student).eos_token == "<|endoftext|>"
    assert run.read_summary()["meta"]["objective"] == "val/loss"


def test_the_best_checkpoint_is_exported(train: Train) -> None:
    """A learning rate that blows up after the first validations: the export is an early student."""
    run = train("sft", "trainer.max_steps=8", "trainer.val_every_n_steps=1", "optim.lr=1.0", "optim.schedule=constant")
    meta = run.read_summary()["meta"]
    with (run.path / "metrics.csv").open() as file:
        curve = {int(row["step"]): float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")}
    assert meta["best_step"] == min(curve, key=lambda step: curve[step])
    assert run.read_summary()["val/loss"] == pytest.approx(min(curve.values()))
    best = torch.load(run.checkpoints / "best.ckpt", weights_only=True)["state_dict"]
    exported = AutoModelForCausalLM.from_pretrained(run.student).state_dict()
    assert all(torch.equal(best[f"student.hf.{name}"], value) for name, value in exported.items())


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = DistillationStep.forward

    def poisoned(step: DistillationStep, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = original(step, batch)
        return (total * float("nan") if batch.step == 3 else total), parts

    monkeypatch.setattr(DistillationStep, "forward", poisoned)
    with pytest.raises(
        NonFiniteLossError, match=r"the loss is nan at optimiser step 3, rows \[\d+, .*\] of the training set"
    ):
        train("sft", "trainer.checkpoint_every_n_steps=1", "evaluation=none")
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


def test_a_directory_that_holds_another_run(train: Train, world: World, tmp_path: Path) -> None:
    run = train("sft")
    with pytest.raises(ConfigError, match="already holds a run; give another run_dir, or resume=true"):
        train("sft")
    with pytest.raises(ConfigError, match=r"another config: .*optim.lr \(0.01 there, 0.5 now\)"):
        train("sft", "resume=true", "optim.lr=0.5")
    before = run.summary.stat().st_mtime_ns
    train("sft", "resume=true")
    assert run.summary.stat().st_mtime_ns == before


def test_all_config_errors_come_at_once(world: World, tmp_path: Path) -> None:
    overrides = world.overrides(
        tmp_path / "x",
        "delta_kd",
        "model.teacher.path=/no/such/dir",
        "model.teacher_raw.path=null",
        "loss.temperature=-1",
        "optim.lr=0",
        "data.batch_size=0",
        "data.train=nowhere.jsonl",
        "trainer.accumulate_grad_batches=0",
        "evaluation.decoding.temperature=-2",
        "objective=test/rougeL",
    )
    with pytest.raises(ConfigError) as caught:
        run_training(make_settings(compose_config("train", overrides)), tmp_path / "x")
    text = str(caught.value)
    for part in (
        "loss.temperature is -1",
        "optim.lr is 0",
        "data.batch_size is 0",
        "nowhere.jsonl",
        "trainer.accumulate_grad_batches is 0",
        "evaluation.decoding.temperature",
        "never on a test set",
    ):
        assert part in text, part
    assert not (tmp_path / "x").exists()
    overrides = world.overrides(
        tmp_path / "x", "delta_kd", "model.teacher.path=/no/such/dir", "model.teacher_raw.path=null"
    )
    with pytest.raises(
        ConfigError, match=r"(?s)model.teacher.path=/no/such/dir: no such directory.*model.teacher_raw.path is missing"
    ):
        run_training(make_settings(compose_config("train", overrides)), tmp_path / "x")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_step=3"], r"no config key 'trainer.max_step'; the nearest one is 'trainer.max_steps'"),
        (["model.techer.path=x", "sed=3"], r"(?s)nearest one is 'model.teacher.path'.*nearest one is 'seed'"),
        (["loss=delta_kdd"], r"loss=delta_kdd does not exist; the nearest is 'delta_kd'; allowed: "),
    ],
)
def test_typos_name_the_nearest_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config("train", overrides)


def test_a_checkpoint_of_another_architecture(train: Train, world: World, tmp_path: Path) -> None:
    student = save_model(tmp_path / "student", seed=1)
    path = f"model.student.path={student}"
    run = train("sft", path)
    run.summary.unlink()
    shutil.rmtree(student)
    save_model(student, seed=1, width=32)
    with pytest.raises(
        ValueError, match=r"the checkpoint is of another architecture than model.student \(.*size mismatch"
    ):
        train("sft", path, "resume=force")
    (run.checkpoints / "last.ckpt").write_bytes(b"cut in half")
    with pytest.raises(ValueError, match=r"last.ckpt can't be read .*; remove it to start again"):
        train("sft", path, "resume=force")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation=default", "evaluation.sets={mine: nowhere.jsonl}"], r"evaluation.sets.mine: no such file"),
        (["evaluation=default", "evaluation.sets={val: x.jsonl}"], r"can't be called val, train, retained or meta"),
        (["evaluation.sets=x.jsonl"], r"evaluation.sets is 'x.jsonl'; give names and files"),
        (
            ["evaluation.seeds=10"],
            r"evaluation.seeds is 10; it must be a list \(each a whole number from 0 to 4294967295\) of at least 1",
        ),
        (["trainer.max_steps=abc"], r"trainer.max_steps is 'abc'; it must be a whole number from 1 or null"),
        (
            ["trainer.profiler=cprofile"],
            r"trainer.profiler is 'cprofile'; it must be simple, advanced, pytorch or null",
        ),
        (["model.tokenizer.train_on=a.txt"], r"given for a pretrained student"),
        (["model.teacher.init=random"], r"a reference has to have learnt something"),
        (["evaluation.sets.mine=x"], r"evaluation.sets is empty: give it whole as evaluation.sets=\{...\}"),
        (["objective=val/perplexity"], r"allowed are val/rougeL, .*val/loss, val/ce, val/forward_kl"),
        (["+loss.weight=2"], r"loss has no key 'weight'; the nearest is 'ce_weight'; allowed: ce_weight, "),
    ],
)
def test_what_can_be_known_before_the_models_load(train: Train, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train("delta_kd", *overrides)


def test_positions_of_all_models_are_checked_before_one_is_loaded(train: Train) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)max_length is 400, but model.student has positions for 128 .*but model.teacher has"
    ):
        train("kd", "data.max_length=400")


def test_without_validation_data_the_last_student_and_the_training_loss_count(train: Train) -> None:
    run = train("sft", drop=("data.val",))
    summary = run.read_summary()
    assert summary["meta"]["objective"] == "train/loss"
    assert summary["train/loss"] == losses(run)[-1]
    assert (run.checkpoints / "last.ckpt").is_file()
    assert run.student.is_dir()


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = DistillationStep.forward

    def poisoned(step: DistillationStep, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = original(step, batch)
        if batch.step == 3:
            # 0 · √0: the value is 0, the gradient 0 · ∞.
            total = total + 0.0 * (total - total.detach()).sqrt()
        return total, parts

    monkeypatch.setattr(DistillationStep, "forward", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"the gradient's norm is nan at optimiser step 3, rows \[\d+"):
        train("sft", "trainer.checkpoint_every_n_steps=1")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


def test_a_pad_token_of_the_student_alone(train: Train, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    student = save_model(tmp_path / "padded", seed=1, tokenizer=tokenizer)
    assert losses(train("delta_kd", f"model.student.path={student}", f"model.student_raw.path={student}"))


def test_unknown_keys_that_were_added_by_force(train: Train) -> None:
    with pytest.raises(ConfigError, match=r"model.student has no key 'dropout'; allowed: adapter, architecture, dtype"):
        train("sft", "+model.student.dropout=0.1")


@pytest.mark.parametrize("mode", ["fast", pytest.param("overfit", marks=pytest.mark.slow), "profile"])
def test_debug_configs(train: Train, mode: str) -> None:
    extra = [f"debug={mode}", "evaluation=default"]
    run = train("kd", *extra, drop=("trainer.max_steps", "evaluation=none", "logger"))
    meta = run.read_summary()["meta"]
    assert meta["steps"] == {"fast": 2, "overfit": 200, "profile": 20}[mode]
    if mode == "profile":
        assert "run_training_batch" in (run.path / "fit-profile.txt").read_text()
    if mode == "overfit":
        assert losses(run)[-1] < 0.5 * losses(run)[0]


def test_another_tokenizer_is_refused(train: Train, tmp_path: Path) -> None:
    from deltakd.models import train_tokenizer

    other = train_tokenizer(["something else altogether, with other words"], 290)
    teacher = save_model(tmp_path / "foreign", seed=3, tokenizer=other)
    with pytest.raises(
        ValueError, match=r"the teacher has another tokenizer than the student: \d+ of \d+ tokens differ \(id"
    ):
        train("kd", f"model.teacher.path={teacher}")


def test_padded_rows_of_a_teacher_are_cut(train: Train, tmp_path: Path) -> None:
    padded = save_model(tmp_path / "padded", seed=3, width=24, vocab_size=512)
    assert losses(train("kd", f"model.teacher.path={padded}"))[-1] > 0


def test_rows_that_are_all_too_long(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all 32 rows are longer than the limits.*data.max_prompt_length = 5"):
        train("sft", "data.max_length=6", "data.max_prompt_length=5", "data.overlong=drop")


def test_broken_rows_are_named_by_file_and_line(train: Train, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", make_rows(2, 0))
    path.write_text(path.read_text() + "{not json\n" + '{"instruction": "x"}\n')
    with pytest.raises(ValueError, match=r"(?s)bad.jsonl:3.*bad.jsonl:4"):
        train("sft", f"data.train={path}")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "opt"])
def test_other_families_need_nothing_special(train: Train, tmp_path: Path, family: str) -> None:
    student = save_model(tmp_path / "student", seed=1, family=family)
    teacher = save_model(tmp_path / "teacher", seed=2, width=24, family=family)
    run = train(
        "delta_kd",
        f"model.student.path={student}",
        f"model.teacher.path={teacher}",
        f"model.teacher_raw.path={teacher}",
    )
    assert losses(run)[-1] < losses(run)[0]
    assert AutoModelForCausalLM.from_pretrained(run.student).config.model_type == family
