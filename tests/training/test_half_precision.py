"""Half-precision weights at small learning rates: float32 masters and stochastic rounding."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError, Stopped
from deltakd.io.run_directory import RunDirectory
from deltakd.training.callbacks.checkpoints import read_checkpoint
from deltakd.training.half_precision import HalfPrecisionAdamW, round_stochastically
from deltakd.training.module import DistillationModule
from deltakd.training.optim import AdamW
from deltakd.types import Batch
from tests.tiny import World
from tests.training.test_training import same, weights

SHAPES = ((200, 50), (300,))


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((0.02 * torch.randn(shape, generator=generator)).bfloat16().to(dtype)) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, given: Sequence[nn.Parameter], steps: range) -> None:
    """Steps with gradients that half precision can hold, the same for every dtype."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in given:
            gradient = torch.randn(parameter.shape, generator=generator).bfloat16()
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def moved(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    pairs = list(zip(after, before, strict=True))
    return float(sum((a != b).sum() for a, b in pairs)) / sum(a.numel() for a, _ in pairs)


def test_few_weights_move_unless_updates_are_kept() -> None:
    """20 steps at 1e-5: the shares of weights that differ from where they began."""
    shares = {}
    for name in ("float32", "nearest", "masters", "stochastic"):
        given = parameters(torch.float32 if name == "float32" else torch.bfloat16)
        before = [p.detach().clone() for p in given]
        options: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0}
        if name in ("float32", "nearest"):
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(given, **options)
        else:
            optimizer = HalfPrecisionAdamW(given, **options, half_weights=name)  # type: ignore[arg-type]
        run(optimizer, given, range(20))
        shares[name] = moved(given, before)
        if name == "stochastic":
            drift = torch.cat([(p.detach() - b).float().flatten() for p, b in zip(given, before, strict=True)])
        elif name == "float32":
            exact = torch.cat([(p.detach() - b).flatten() for p, b in zip(given, before, strict=True)])
    assert shares["float32"] > 0.99
    assert shares["nearest"] < 0.25
    assert shares["masters"] > 1.5 * shares["nearest"]
    assert shares["stochastic"] > shares["masters"]
    # On average the weights are where float32 takes them.
    assert float((drift * exact).sum() / exact.square().sum()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_are_the_float32_run(dtype: torch.dtype) -> None:
    """With the same gradients: master and moments bit by bit, and the weights their rounding."""
    wide, half = parameters(torch.float32), parameters(dtype)
    options: dict[str, Any] = {"lr": 3e-4, "weight_decay": 0.1}
    exact, ours = torch.optim.AdamW(wide, **options), HalfPrecisionAdamW(half, **options, half_weights="masters")
    for parameter, start in zip(half, wide, strict=True):
        assert torch.equal(parameter.float(), start)
    run(exact, wide, range(30))
    run(ours, half, range(30))
    for w, h in zip(wide, half, strict=True):
        assert torch.equal(ours.state[h]["master"], w)
        assert torch.equal(ours.state[h]["exp_avg_sq"], exact.state[w]["exp_avg_sq"])
        assert torch.equal(h, w.to(dtype))


@pytest.mark.parametrize("half_weights", ["masters", "stochastic"])
def test_float32_weights_are_updated_as_by_pytorch(half_weights: Any) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    run(HalfPrecisionAdamW(ours, lr=1e-3, half_weights=half_weights), ours, range(5))
    run(torch.optim.AdamW(theirs, lr=1e-3), theirs, range(5))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("half_weights", ["masters", "stochastic"])
def test_a_resumed_optimiser_goes_on_bit_by_bit(half_weights: Any) -> None:
    """PyTorch casts a loaded state to the weights' dtype, which would round masters and moments."""
    options: dict[str, Any] = {"lr": 1e-4, "half_weights": half_weights, "seed": 3}
    whole = parameters(torch.bfloat16)
    run(HalfPrecisionAdamW(whole, **options), whole, range(12))
    first = parameters(torch.bfloat16)
    stopped = HalfPrecisionAdamW(first, **options)
    run(stopped, first, range(7))
    file = io.BytesIO()
    torch.save((stopped.state_dict(), first), file)
    file.seek(0)
    state, again = torch.load(file, weights_only=False)
    resumed = HalfPrecisionAdamW(again, **options)
    resumed.load_state_dict(state)
    run(resumed, again, range(7, 12))
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


def test_stochastic_rounding() -> None:
    """A number between two neighbours goes to either, as often as is right on average; one that fits stays."""
    generator = torch.Generator().manual_seed(0)
    low, high = 1.0, 1.0 + 2**-7
    for sign in (1.0, -1.0):
        for share in (0.0, 0.1, 0.5, 0.9):
            values = torch.full((20_000,), sign * (low + share * (high - low)))
            rounded = round_stochastically(values, generator).float()
            assert set(rounded.abs().unique().tolist()) <= {low, high}
            assert float((rounded.abs() == high).float().mean()) == pytest.approx(share, abs=0.015)
    special = torch.tensor([0.0, float("inf"), float("-inf"), 3.0])
    assert torch.equal(round_stochastically(special, generator).float(), special)
    assert round_stochastically(torch.tensor([float("nan")]), generator).isnan().all()


def test_the_seed_of_the_noise() -> None:
    found = []
    for seed in (0, 0, 1):
        given = parameters(torch.bfloat16)
        run(HalfPrecisionAdamW(given, lr=1e-4, half_weights="stochastic", seed=seed), given, range(3))
        found.append(given[0].detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_does_not_go_together_is_refused(world: World, tmp_path: Path) -> None:
    def refused(*extra: str) -> str:
        with pytest.raises(ConfigError) as error:
            make_settings(compose_config("train", world.overrides(tmp_path / "run", "kd", *extra)))
        return str(error.value)

    assert "ZeRO keeps float32 masters of its own" in refused("optim.half_weights=masters", "strategy=deepspeed_zero2")
    stochastic = "optim.half_weights=stochastic"
    assert "for bfloat16, and the student is float16" in refused(stochastic, "model.student.dtype=float16")
    assert "optim.half_weights is 'up'" in refused("optim.half_weights=up")
    with pytest.raises(ValueError, match="is for bfloat16"):
        HalfPrecisionAdamW(parameters(torch.float16), half_weights="stochastic")
    assert AdamW().half_weights == "nearest"


@pytest.mark.parametrize("half_weights", ["masters", "stochastic"])
def test_a_run_resumes_bit_by_bit(
    train: Callable[..., RunDirectory], half_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accumulation and clipping, stopped in step 2; no warning that updates are lost."""
    options = (
        "model.student.dtype=bfloat16",
        f"optim.half_weights={half_weights}",
        "optim.lr=1e-5",
        "trainer.max_steps=4",
        "trainer.accumulate_grad_batches=2",
        "trainer.gradient_clip_val=0.5",
    )
    whole = train("kd", *options, name="whole")
    original = DistillationModule.training_step

    def stop_in_step_2(module: DistillationModule, batch: Batch, batch_idx: int) -> Tensor:
        if batch.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(module, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", stop_in_step_2)
    with pytest.raises(Stopped, match="after 3 optimiser steps"):
        train("kd", *options, name="part")
    monkeypatch.undo()
    part = train("kd", *options, "resume=true", name="part")
    assert same(weights(whole), weights(part))
    assert all(w.dtype == torch.bfloat16 for w in weights(whole).values())
    ends = [read_checkpoint(run.checkpoints / "last.ckpt")["optimizer_states"][0]["state"] for run in (whole, part)]
    kept = {"step", "exp_avg", "exp_avg_sq"} | ({"master"} if half_weights == "masters" else set())
    for ours, theirs in zip(*(state.values() for state in ends), strict=True):
        assert ours.keys() == kept
        assert all(ours[name].dtype == torch.float32 and torch.equal(ours[name], theirs[name]) for name in ours)
