"""Every ready-made loss by its name through a whole training; losses that change with training; interruptions."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.training.module import DistillationModule
from deltakd.types import Batch
from tests.losses.by_name import ALIGNED, NAMES
from tests.tiny import World, save_model

Train = Callable[..., RunDirectory]
#: One of each kind; losses of sampled tokens train in tests/rollouts, the others in `make test-slow`, and all are held
#: against their formulas in tests/losses.
QUICK = ("sft", "kd_jsd", "delta_multi_teacher", "parallel_ratio", "signed_parallelogram", "taid", "dskd")


def column(run: RunDirectory, name: str) -> list[float]:
    with (run.path / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture(scope="session")
def sharp(world: World) -> dict[str, str]:
    """Role -> override: references that are far from uniform, and a second pair of teachers."""
    models = {
        "teacher": (3, 24, 0.4),
        "teacher_raw": (2, 24, 0.2),
        "teacher_2": (4, 8, 0.4),
        "teacher_raw_2": (5, 8, 0.2),
    }
    for role, (seed, width, spread) in models.items():
        save_model(world.root / "sharp" / role, seed=seed, width=width, initializer_range=spread)
    return {role: f"model.{role}.path={world.root / 'sharp' / role}" for role in models}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in [*NAMES, *ALIGNED]]
)
def test_every_loss_trains_and_falls(train: Train, sharp: dict[str, str], name: str) -> None:
    """Without the labels, which would make any sum fall; TAID with a u that stands, else its target moves away.

    DSKD's projectors move faster: they begin at random values.
    """
    models = [value for role, value in sharp.items() if name == "delta_multi_teacher" or not role.endswith("_2")]
    alone = {
        "sft": [],
        "taid": ["loss.ce_weight=0", "loss.target.end=0.41"],
        "dskd": ["loss.ce_weight=0", "loss.projector_lr=0.02"],
    }.get(name, ["loss.ce_weight=0"])
    run = train(name, "trainer.max_steps=16", "data.val=null", *alone, *models)
    curve = column(run, "train/loss")
    assert len(curve) == 16
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])
    assert (run.student / "model.safetensors").is_file()


def test_identities_4_5_and_12_through_whole_trainings(train: Train, sharp: dict[str, str]) -> None:
    """delta(1) = shift(1) = bilinear(1, 1); λ = 1 is SFT, bit for bit, and no reference is loaded."""
    models = [value for role, value in sharp.items() if not role.endswith("_2")]
    curves = [
        column(train(name, *models, name=name), "train/loss") for name in ("delta_kd", "delta_shift", "delta_bilinear")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0] == pytest.approx(curves[2], rel=1e-5)
    only_labels = train("delta_kd", "loss.ce_weight=1", "model.teacher.path=null", name="labels")
    assert column(only_labels, "train/loss") == column(train("sft", name="sft"), "train/loss")
    assert set(only_labels.read_summary()["meta"]["parameters"]) == {"student"}


def test_taid_resumes_exactly(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """u depends on the losses so far: stopped and started again it goes the same way, to the same student."""
    options = ("trainer.max_steps=12", "loss.target.rate=0.3", "loss.target.momentum=0.5", "optim.lr=0.02")
    whole = train("taid", *options, name="whole")
    weights = column(whole, "train/taid_weight")
    line = [0.4 + 0.6 * step / 12 for step in range(12)]
    assert weights[0] == 0.4
    assert max(w - at for w, at in zip(weights, line, strict=True)) > 0.01
    with monkeypatch.context() as patch:
        _stop_after(patch, 5)
        with pytest.raises(InterruptedError):
            train("taid", *options, "trainer.checkpoint_every_n_steps=1", name="parts")
    parts = train("taid", *options, "trainer.checkpoint_every_n_steps=1", "resume=true", name="parts")
    assert column(parts, "train/taid_weight") == weights
    assert column(parts, "train/loss") == column(whole, "train/loss")
    mine, other = (torch.load(r.checkpoints / "last.ckpt", weights_only=True) for r in (whole, parts))
    assert mine["schedules"] == other["schedules"]
    assert mine["schedules"]["taid_weight"].keys() == {"value", "momentum", "loss_before"}


def test_projectors_are_trained_saved_and_resumed_exactly_but_not_exported(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("trainer.max_steps=6", "loss.projector_lr=0.02")
    whole = train("dskd", *options, name="whole")
    with monkeypatch.context() as patch:
        _stop_after(patch, 3)
        with pytest.raises(InterruptedError):
            train("dskd", *options, "trainer.checkpoint_every_n_steps=1", name="parts")
    parts = train("dskd", *options, "trainer.checkpoint_every_n_steps=1", "resume=true", name="parts")
    assert column(parts, "train/loss") == column(whole, "train/loss")
    saved, again = (torch.load(r.checkpoints / "last.ckpt", weights_only=True) for r in (whole, parts))
    projectors = {f"step.loss_part.{layer}.{p}" for layer in ("t2s", "s2t", "query") for p in ("weight", "bias")}
    assert projectors <= saved["state_dict"].keys()
    assert all(torch.equal(value, again["state_dict"][name]) for name, value in saved["state_dict"].items())
    groups = saved["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [0.01, 0.01, 0.02, 0.02]
    assert sum(len(group["params"]) for group in groups[2:]) == len(projectors)
    assert not any("loss_part" in name or "t2s" in name for name in load_file(whole.student / "model.safetensors"))
    first, *_, last = column(whole, "train/projected_ce")
    assert last < first


def _stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    original = DistillationModule.training_step

    def stopping(module: DistillationModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        if module.global_step == steps:
            raise InterruptedError
        return original(module, batch, batch_idx)

    patch.setattr(DistillationModule, "training_step", stopping)


def test_a_delta_weight_that_moves(train: Train, world: World) -> None:
    run = train("delta_kd", "delta_weight={schedule: cosine, from: 0, to: 1, steps: 4}", "trainer.max_steps=6")
    expected = [(1 - math.cos(math.pi * min(1.0, step / 4))) / 2 for step in range(6)]
    assert column(run, "train/delta_weight") == pytest.approx(expected)
    summary = run.read_summary()
    # The raw models are there though the first weight is 0; a loss that moves is not what chooses the best student.
    assert set(summary["meta"]["parameters"]) == {"student", "teacher", "teacher_raw", "student_raw"}
    assert summary["meta"]["objective"] == "val/ce"
    with pytest.raises(ConfigError, match="objective is val/loss, but delta_weight changes with training"):
        train("delta_kd", "delta_weight={schedule: linear, from: 0, to: 1}", "objective=val/loss", name="b")


@pytest.mark.parametrize(
    ("loss", "overrides", "message"),
    [
        ("delta_kd", ["delta_weight=nan"], "delta_weight is nan; it must be a finite number"),
        ("delta_kd", ["delta_weight={schedule: linear, from: 0}"], "a linear schedule also needs to"),
        ("delta_kd", ["delta_weight={schedule: steps, to: 1}"], "delta_weight is .*; give a number, or a mapping"),
        ("delta_kd", ["loss.target.treatment.clip=-1"], "treatment.clip is -1; it must be a finite number of nats"),
        ("delta_kd", ["loss.temperature=0", "loss.ce_weight=2"], "loss.temperature is 0; .*; loss.ce_weight is 2;"),
        ("parallelogram", ["loss.weights.delta=-1"], "loss.weights.delta is -1; it must be a finite number from 0"),
        ("parallelogram", ["loss.weights={teacher:0,student_raw:0,delta:0,shift:0}"], "they add up to 0"),
        ("kd_jsd", ["loss.divergence.beta=1"], "loss.divergence.beta is 1; .* use loss=kd"),
        ("kd_skew", ["loss.divergence.skew=1"], "loss.divergence.skew is 1; it must be at least 0"),
        ("kd_symmetric", ["loss.divergence.weight=1.5"], "loss.divergence.weight is 1.5; it must be between 0 and 1"),
        ("kd_plus_delta", ["delta_weight=-1"], "delta_weight is -1.0; for this loss it must be at least 0"),
        ("taid", ["loss.target.start=1"], "loss.target.start is 1; it must be at least 0 and below 1"),
        ("kd", ["loss.divergence=todi"], "loss.divergence is 'todi'; .* choose one with loss/divergence=NAME"),
        (
            "sft",
            ["loss._target_=builtins.dict"],
            "loss is {}, not a deltakd.types.losses.Loss; name one that is ready-made",
        ),
        ("sft", ["loss._target_=deltakd.losses.ToDi"], "loss is an object of deltakd.losses.divergences.ToDi, not a"),
        (
            "sft",
            ["loss._target_=hydra.utils.get_method", "+loss.path=deltakd.losses.cross_entropy"],
            "loss is the function deltakd.losses.sft.cross_entropy, not a",
        ),
        ("delta_multi_teacher", [], "model.teacher_2.path is missing"),
        ("delta_multi_teacher", ["loss.target.weights=[1,1,1]"], "the loss reads teacher_3, which the config lacks"),
    ],
)
def test_bad_input_is_named_before_anything_loads(train: Train, loss: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(loss, *overrides)
