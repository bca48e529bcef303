"""Runs grouped into methods, named by what tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from deltakd.config.compose import CONF_DIR, compose_config
from deltakd.config.loss_names import delta_weight_keys, flat, loss_name, read_losses
from deltakd.results.methods import Method, make_methods
from deltakd.results.reading import find_runs
from tests.losses.by_name import ALIGNED, NAMES
from tests.results.fake import Config, write_run


def methods_of(folder: Path) -> tuple[list[Method], list[str]]:
    notes: list[str] = []
    return make_methods(find_runs([str(folder)]).runs, read_losses(CONF_DIR / "loss"), notes), notes


@pytest.mark.parametrize("name", ["sft", "kd_skew", "delta_kd", "delta_shift", "parallel_ratio", "parallel_cross"])
def test_a_composed_loss_is_called_by_its_name(name: str) -> None:
    cfg = compose_config(
        "train",
        [f"loss={name}", "delta_weight=0.3", "loss.temperature=2"][: 2 if name == "sft" else 3],
    )
    composed = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(composed, dict)
    assert loss_name(composed["loss"], read_losses(CONF_DIR / "loss")) == name


@pytest.mark.parametrize("name", [*NAMES, *ALIGNED])
def test_every_loss_is_read_as_hydra_composes_it(name: str) -> None:
    composed = compose_config("train", [f"loss={name}"], checked=True)
    as_written = OmegaConf.to_container(composed.loss, resolve=False)
    assert read_losses(CONF_DIR / "loss").losses[name] == flat(as_written)


@pytest.mark.parametrize(
    ("choices", "name", "weighted"),
    [
        (["loss=delta_kd", "loss/divergence=todi"], "delta_kd + todi", {"target.delta_weight"}),
        (["loss=delta_kd", "loss/divergence=reverse_kl"], "delta_kd_reverse", {"target.delta_weight"}),
        (["loss=kd", "loss/target=delta"], "delta_kd", {"target.delta_weight"}),
        (["loss=kd_jsd", "loss/target=bilinear"], "delta_bilinear + jsd", {"target.delta_weight"}),
        (["loss=kd_tvd", "loss/target=multi_teacher"], "delta_multi_teacher + tvd", {"target.delta_weight"}),
        (["loss=taid", "loss/divergence=alpha_beta"], "taid + alpha_beta", set()),
        (["loss=parallelogram", "loss/divergence=jsd"], "parallelogram + jsd", {"delta_weight"}),
        (["loss=kd_plus_delta", "loss/matching=cross"], "kd_plus_delta + cross", {"delta_weight"}),
        (
            ["loss=kd_plus_delta", "loss/matching=ratio", "loss/divergence=todi"],
            "kd_plus_delta + todi + ratio",
            {"delta_weight"},
        ),
        (["loss=parallel_ratio", "loss/matching=cross"], "parallel_cross", set()),
        (["loss=delta_kd", "loss.divergence={_target_: mine.Far}"], "delta_kd + Far", {"target.delta_weight"}),
        (["loss=kd", "loss.target={_target_: mine.my_target}"], "kd + my_target", set()),
    ],
)
def test_a_combination_is_called_by_its_loss_and_the_parts_chosen_in_it(
    choices: list[str], name: str, weighted: set[str]
) -> None:
    cfg = compose_config("train", ["delta_weight=0.3", *choices], checked=True)
    composed: Any = OmegaConf.to_container(cfg, resolve=True)
    known = read_losses(CONF_DIR / "loss")
    assert loss_name(composed["loss"], known) == name
    assert delta_weight_keys(composed["loss"], known) == weighted


def test_a_loss_of_your_own_is_called_by_its_classes() -> None:
    own = {"_target_": "mine.Own", "inner": {"_target_": "mine.inner", "delta_weight": 0.3}}
    known = read_losses(CONF_DIR / "loss")
    assert loss_name(own, known) == "Own/inner"
    assert delta_weight_keys(own, known) == {"inner.delta_weight"}


def test_runs_that_differ_in_their_seed_are_one_method_named_by_what_differs(tmp_path: Path) -> None:
    for number, (loss, weight, seed) in enumerate(
        [("sft", 1.0, 2), ("sft", 1.0, 1), ("kd", 0.5, 1), ("kd", 1.0, 2), ("delta_kd", 0.5, 1), ("delta_kd", 1.0, 1)]
    ):
        write_run(tmp_path / str(number), loss, seed, weight=weight)
    methods, notes = methods_of(tmp_path)
    # The weight is none of kd's settings.
    assert [(m.label, m.seeds, m.delta_weight) for m in methods] == [
        ("sft", [1, 2], None),
        ("kd", [1, 2], None),
        ("delta_kd delta_weight=0.5", [1], 0.5),
        ("delta_kd delta_weight=1.0", [1], 1.0),
    ]
    assert notes == []
    assert methods[0].scores("test", "rougeL").shape == (2, 30)


def test_a_repeated_run_is_left_out_and_a_setting_that_differs_is_named(tmp_path: Path) -> None:
    def other(config: Config) -> None:
        config["optim"]["lr"] = 0.1
        config["run_dir"] = "elsewhere"

    for number, change in enumerate([lambda config: None, lambda config: config.update(resume=True), other]):
        write_run(tmp_path / str(number), "kd", change=change)
    write_run(tmp_path / "3", "kd", 5, finished=False)
    write_run(tmp_path / "4", "kd", 5)
    methods, notes = methods_of(tmp_path)
    assert [method.label for method in methods] == ["kd lr=0.001", "kd lr=0.1"]
    assert methods[0].seeds == [0, 5]
    assert len(notes) == 2
    assert f"{tmp_path}/1 repeats {tmp_path}/0" in notes[0]
    assert "the former is left out" in notes[1]


def test_references_from_disk_are_the_same_method_unless_they_are_approximate(tmp_path: Path) -> None:
    for store in ("hidden", "topk"):
        (tmp_path / "caches" / store).mkdir(parents=True)
        (tmp_path / "caches" / store / "summary.json").write_text(f'{{"store": "{store}"}}')
    write_run(tmp_path / "0", "kd", 0)
    for seed, store in enumerate(("hidden", "topk"), 1):
        reference = {"path": str(tmp_path / "caches" / store), "store": None}
        write_run(tmp_path / str(seed), "kd", seed, change=lambda config, it=reference: config.update(reference=it))
    methods, _ = methods_of(tmp_path)
    assert [(m.label, m.seeds) for m in methods] == [("kd references=exact", [0, 1]), ("kd references=topk", [2])]


def test_an_evaluation_is_a_row_of_its_own_named_by_its_model(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "kd")
    write_run(tmp_path / "evaluated", change=lambda config: config.update(evaluated_model="some/where/student"))
    methods, _ = methods_of(tmp_path)
    assert [(m.label, m.runs[0].evaluation_only) for m in methods] == [("where (evaluated)", True), ("kd", False)]


def test_stages_keep_their_names_and_models_that_others_learnt_from_are_told_apart(tmp_path: Path) -> None:
    def stage(name: str, **paths: Path) -> None:
        def change(config: Config) -> None:
            config["name"] = f"study/{name}"
            config["model"] = {role: {"path": str(path / "student")} for role, path in paths.items()}
            config["data"]["train"] = "text" if name == "pretrain" else "rows.jsonl"

        write_run(
            tmp_path / name, "kd" if "kd" in name else "sft", int(name[-1]) if name[-1].isdigit() else 0, change=change
        )

    stage("pretrain")
    stage("big", student=tmp_path / "nothing")
    stage("first", student=tmp_path / "pretrain")
    # It goes on from `first`, which is a method all the same.
    stage("kd_seed1", student=tmp_path / "first", teacher=tmp_path / "big")
    stage("kd_seed2", student=tmp_path / "first", teacher=tmp_path / "big")
    methods, _ = methods_of(tmp_path)
    assert [(method.label, method.role) for method in methods] == [
        ("big", "teacher"),
        ("pretrain", "raw student"),
        ("first", None),
        ("kd", None),
    ]


def test_many_settings_that_differ_make_no_long_name_but_a_legend(tmp_path: Path) -> None:
    def settings(number: int) -> Callable[[Config], None]:
        def change(config: Config) -> None:
            config["optim"] |= {"lr": 0.1 * number, "weight_decay": 0.1 * number}
            config["data"] |= {"max_length": 100 + number, "preview": "none" if number else "text"}

        return change

    for number in range(3):
        write_run(tmp_path / str(number), "delta_kd", weight=0.5 * number, change=settings(number))
        write_run(tmp_path / f"kd{number}", "kd", change=settings(number))
    methods, _ = methods_of(tmp_path)
    labels = [method.label for method in methods]
    assert labels[:3] == [f"delta_kd delta_weight={weight}" for weight in (0.0, 0.5, 1.0)]
    assert labels[3:] == ["kd", "kd (2)", "kd (3)"]
    assert list(methods[3].settings) == ["data.max_length", "optim.lr", "optim.weight_decay"]
    assert methods[5].settings["data.max_length"] == "102"
    assert max(map(len, labels)) <= 30
