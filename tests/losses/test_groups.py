"""The config groups of a loss: every target under every divergence, and what is said of choices that don't exist."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from deltakd.config.compose import CONF_DIR, RENAMED_KEYS, compose_config
from deltakd.io.errors import ConfigError
from deltakd.losses import (
    AdaptiveKL,
    AlphaBeta,
    Distillation,
    Divergence,
    ForwardKL,
    JensenShannon,
    LogitMSE,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    Target,
    ToDi,
    TotalVariation,
    bilinear_target,
    delta_target,
    gated_delta_target,
    multi_teacher_target,
    shift_target,
    taid_target,
    teacher_target,
)
from deltakd.types import Loss

WEIGHT = 0.3
TARGETS: Mapping[str, Callable[[], Target]] = {
    "teacher": teacher_target,
    "delta": lambda: delta_target(WEIGHT),
    "shift": lambda: shift_target(WEIGHT),
    "bilinear": lambda: bilinear_target(WEIGHT, 1.0),
    "gated": lambda: gated_delta_target(WEIGHT, 1.0),
    "taid": lambda: taid_target(0.4, 1.0, 5e-4, 0.99),
    "multi_teacher": lambda: multi_teacher_target([0.5, 0.5], WEIGHT),
}
DIVERGENCES: Mapping[str, Divergence] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "symmetric_kl": SymmetricKL(0.5),
    "jsd": JensenShannon(0.5),
    "tvd": TotalVariation(),
    "skew_forward_kl": SkewForwardKL(0.1),
    "skew_reverse_kl": SkewReverseKL(0.1),
    "adaptive_kl": AdaptiveKL(0.5),
    "todi": ToDi(),
    "alpha_beta": AlphaBeta(0.2, 0.7),
    "logit_mse": LogitMSE(),
}
ROLES = ("student", "teacher", "teacher_raw", "student_raw", "teacher_2", "teacher_raw_2")


def composed(base: str, *choices: str) -> Loss:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose(f"loss/{base}", [f"+delta_weight={WEIGHT}", *choices])
    loss: Loss = hydra.utils.instantiate(OmegaConf.to_container(config.loss, resolve=True), _convert_="all")
    return loss


def test_the_folders_hold_what_is_tested_here() -> None:
    for group, choices in (("target", TARGETS), ("divergence", DIVERGENCES)):
        there = {path.stem for path in (CONF_DIR / "loss" / group).glob("*.yaml")}
        # span_shift reads an alignment beside the logits: tests/losses/test_two_tokenizers.py.
        assert there - {"span_shift"} == set(choices)


@pytest.mark.parametrize(("target", "divergence"), itertools.product(TARGETS, DIVERGENCES))
def test_a_target_under_a_divergence_is_the_loss_made_of_the_two(target: str, divergence: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = {role: 2 * torch.randn(7, 23, generator=generator, dtype=torch.float64) for role in ROLES}
    labels = torch.randint(0, 23, (7,), generator=generator)
    loss = composed("kd", f"loss/target={target}", f"loss/divergence={divergence}")
    direct = Distillation(TARGETS[target](), DIVERGENCES[divergence])
    assert loss.requires == direct.requires
    assert loss.fused_form == direct.fused_form
    output, expected = loss(logits, labels), direct(logits, labels)
    assert torch.equal(output.per_token, expected.per_token)
    assert output.parts.keys() == expected.parts.keys()


def model_and_loss(*overrides: str) -> Any:
    cfg = compose_config("train", overrides)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    return resolved["model"], resolved["loss"]


@pytest.mark.parametrize(
    ("name", "base", "choices"),
    [
        ("delta_kd", "kd", ["loss/target=delta"]),
        ("delta_kd_skew", "kd_skew", ["loss/target=delta"]),
        ("delta_kd_reverse", "delta_kd", ["loss/divergence=reverse_kl"]),
        ("taid", "delta_shift", ["loss/target=taid"]),
        ("delta_multi_teacher", "kd", ["loss/target=multi_teacher"]),
        ("parallel_cross", "parallel_ratio", ["loss/matching=cross"]),
    ],
)
def test_one_loss_comes_about_in_two_ways(name: str, base: str, choices: list[str]) -> None:
    """The second pair of teachers, too, comes with its target."""
    assert model_and_loss(f"loss={base}", *choices) == model_and_loss(f"loss={name}")


def test_keys_of_a_chosen_part_are_known() -> None:
    _, loss = model_and_loss(
        "loss=kd",
        "loss/target=delta",
        "loss/divergence=jsd",
        "loss.divergence.beta=0.4",
        "loss.target.treatment.clip=2",
    )
    assert (loss["divergence"]["beta"], loss["target"]["treatment"]["clip"]) == (0.4, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["loss/divergence=tody"],
            r"loss/divergence=tody does not exist; the nearest is 'todi'; allowed: adaptive_kl, ",
        ),
        (
            ["loss/target=bilinar"],
            r"loss/target=bilinar does not exist; the nearest is 'bilinear'; allowed: bilinear, ",
        ),
        (["loss/diverence=todi"], r"there is no config key 'loss/diverence'; the nearest one is 'loss/divergence'"),
        (["loss=sft", "loss/target=delta"], r"loss/target can't be chosen: the chosen loss has no target"),
        (
            ["loss=kd_jsd", "loss.divergence.bta=0.3"],
            r"'loss\.divergence\.bta'; the nearest one is 'loss\.divergence\.b",
        ),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_the_nearest(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config("train", overrides)


@pytest.mark.parametrize(
    ("loss", "key"),
    [
        ("delta_kd", "loss.target.alpha"),
        ("delta_shift", "loss.target.beta"),
        ("delta_bilinear", "loss.target.u"),
        ("kd_plus_delta", "loss.gamma"),
        ("signed_parallelogram", "loss.alpha"),
    ],
)
def test_a_renamed_key_is_refused_with_its_successor(loss: str, key: str) -> None:
    successor = RENAMED_KEYS[key]
    for typed in (key, f"+{key}"):
        with pytest.raises(ConfigError, match=rf"{key} is now {successor}"):
            compose_config("train", [f"loss={loss}", f"{typed}=0.5"])
    node: Any = compose_config("train", [f"loss={loss}", f"{successor}=0.5"])
    assert OmegaConf.select(node, successor) == 0.5


def test_a_key_keeps_its_name_where_the_letter_is_not_the_delta_weight() -> None:
    """The powers of the α-β-divergence, and JSD's β."""
    _, loss = model_and_loss("loss=kd_alpha_beta", "loss.divergence.alpha=0.3", "loss.divergence.beta=0.4")
    assert (loss["divergence"]["alpha"], loss["divergence"]["beta"]) == (0.3, 0.4)
