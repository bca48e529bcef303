"""From a config to settings: what is refused, by key, value and what is allowed, before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from deltakd.config.build import make_settings, stored_settings
from deltakd.config.compose import CONF_DIR, compose_config
from deltakd.config.instantiate import argument_hints
from deltakd.io.errors import ConfigError
from tests.tiny import World


def told(world: World, path: Path, *overrides: str, loss: str = "delta_kd") -> list[str]:
    """Return every problem of a config."""
    with pytest.raises(ConfigError) as caught:
        make_settings(compose_config("train", world.overrides(path / "run", loss, *overrides)))
    return caught.value.problems


@pytest.mark.parametrize("word", ["no", "off", "'false'", "0", "null"])
@pytest.mark.parametrize(
    "key",
    [
        "model.trust_remote_code", "model.gradient_checkpointing", "evaluation.allow_overlap", "evaluation.generate",
        "evaluation.decoding.do_sample", "resume", "trainer.dry_run", "trainer.compile", "loss.temperature_squared",
        "model.tokenizer.add_prefix_space",
    ],
)  # fmt: skip
def test_only_true_and_false_are_booleans(key: str, word: str, world: World, tmp_path: Path) -> None:
    (problem,) = told(world, tmp_path, f"{key}={word}")
    assert re.fullmatch(rf"{re.escape(key)} is .*; it must be true or false( or force)?", problem)


def test_without_an_experiment_nothing_of_one_is_set() -> None:
    cfg = compose_config("train", [])
    models = [cfg.model[role].path for role in ("student", "teacher", "teacher_raw")]
    assert models == [None, None, None]
    assert (cfg.name, cfg.data.train, cfg.data.val, cfg.data.sets, cfg.data.prepare) == ("run", None, None, {}, None)
    with pytest.raises(ConfigError) as caught:
        make_settings(cfg)
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "model.student.path", "model.teacher.path", "model.teacher_raw.path", "data.train",
    ]  # fmt: skip


def test_an_unsafe_loss_is_not_made_safe_by_the_word_no(world: World, tmp_path: Path) -> None:
    (problem,) = told(world, tmp_path, "loss.unsafe=no", loss="signed_parallelogram")
    assert problem == "loss.unsafe is 'no'; it must be true or false"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.val_size=0.1", "data.val_size is 0.1; it must be a whole number from 0"),
        ("data.limit=0.5", "data.limit is 0.5; it must be a whole number from 1 or null"),
        ("data.batch_size=auto", "data.batch_size is 'auto'; it must be a whole number from 1 or null"),
        ("data.max_length=1e2", "data.max_length is 100.0; it must be a whole number from 1; write 100"),
        ("data.train=5", "data.train is 5; it must be text or a list"),
        ("data.overlong=keep", "data.overlong is 'keep'; it must be cut, drop"),
        ("seed=null", "seed is null; it must be a whole number from 0"),
        ("seed=-1", "seed is -1; it must be a whole number from 0"),
        ("name=5", "name is 5; it must be text; to give these digits as text: "),
        ("optim.betas=0.9", "optim.betas is 0.9; it must be a list (each a finite number"),
        ("optim.warmup_steps=5%", "optim.warmup_steps is '5%'; it must be a finite number from 0"),
        ("optim.lr=fast", "optim.lr is 'fast'; it must be a finite number above 0"),
        ("trainer.devices=-1", "trainer.devices is -1; it must be a whole number from 1 or auto"),
        ("trainer.devices=0", "trainer.devices is 0; it must be a whole number from 1 or auto"),
        ("trainer.checkpoint_every_n_steps=0", "trainer.checkpoint_every_n_steps is 0; it must be a whole number"),
        ("trainer.val_every_n_steps=0.25", "trainer.val_every_n_steps is 0.25; it must be a whole number from 1"),
        ("trainer.precision=bf8", "trainer.precision is 'bf8'; it must be 32-true"),
        ("trainer.accelerator=tpu", "trainer.accelerator is 'tpu'; it must be auto, cpu"),
        ("reference.placement=cuda:0", "reference.placement is 'cuda:0', but this machine has no cuda device"),
        ("reference.placement=moon", "reference.placement is 'moon', which names no device"),
        ("reference.sharding=half", "reference.sharding is 'half'; it must be replicate, shard"),
        ("model.student.path=123", "model.student.path is 123; it must be text or null"),
        ("model.teacher.quantization=8bit", "model.teacher.quantization is '8bit'; it must be a mapping or null"),
        ("+model.teacher.dtypes=float32", "model.teacher has no key 'dtypes'; allowed: adapter, "),
        ("model.lora={r: 8.5}", "model.lora.r is 8.5; it must be a whole number from 1"),
        ("loss.temperature=warm", "loss.temperature is 'warm'; it must be a finite number"),
        ("loss.ce_weight=true", "loss.ce_weight is true; it must be a finite number"),
        ("delta_weight=much", "delta_weight is 'much'; it must be a finite number or a mapping"),
        ("evaluation.seeds=10", "evaluation.seeds is 10; it must be a list (each a whole number from 0 to 4294967295)"),
        ("evaluation.sets=5", "evaluation.sets is 5; give names and files"),
        ("evaluation.measures.rows=all", "evaluation.measures.rows is 'all'; it must be a whole number from 0 or null"),
        ("evaluation.decoding.top_k=1.5", "evaluation.decoding.top_k is 1.5; it must be a whole number from 0"),
        ("kernels.memory_budget=0", "kernels.memory_budget is 0; it must be a finite number above 0"),
        ("strategy.stage=4", "strategy.stage is 4; it must be 1, 2, 3 or null"),
        ("objective=5", "objective is 5; it must be text or null"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_told_alone(override: str, message: str, world: World, tmp_path: Path) -> None:
    extra = ["strategy=deepspeed_zero2"] if override.startswith("strategy") else []
    (problem,) = told(world, tmp_path, *extra, override)
    assert problem.startswith(message), problem


@pytest.mark.parametrize(
    ("strategy", "precision"), [("fsdp", "16-mixed"), ("fsdp", "64-true"), ("deepspeed_zero2", "64")]
)
def test_precisions_that_a_strategy_does_not_train_in_are_told(
    strategy: str, precision: str, world: World, tmp_path: Path
) -> None:
    (problem,) = told(world, tmp_path, f"strategy={strategy}", f"trainer.precision={precision}")
    assert f"trainer.precision={precision} does not go with strategy.name={strategy.split('_')[0]}; give" in problem


@pytest.mark.parametrize(
    ("overrides", "variables", "message"),
    [
        (["mode=on"], {}, "logger.wandb.mode is 'on'; it must be auto, online, offline, disabled"),
        (
            ["mode=online"],
            {},
            "logger.wandb.mode is online, but there is no W&B key for api.wandb.ai; run",
        ),
        (["mode=auto"], {"WANDB_MODE": "online"}, "WANDB_MODE is online, but there is no W&B key for api.wandb.ai; "),
        (["mode=auto"], {"WANDB_MODE": "on"}, "WANDB_MODE is 'on'; allowed: online, run, shared, offline, dryrun"),
        (
            ["mode=online"],
            {"WANDB_BASE_URL": "https://own.host"},
            "there is no W&B key for own.host; run",
        ),
    ],
)
def test_what_keeps_wandb_from_starting_is_told_with_the_other_problems(
    overrides: list[str],
    variables: dict[str, str],
    message: str,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_account(monkeypatch, tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    own = [f"logger.wandb.{override}" for override in overrides]
    first, second = sorted(told(world, tmp_path, "logger=[csv,wandb]", *own, "seed=-1"), key=lambda p: "seed" in p)
    assert message in first
    assert second.startswith("seed is -1")


@pytest.mark.parametrize("place", ["variable", "netrc", "named", "offline", "unset"])
def test_wandb_has_no_problem_with_a_key_or_without_a_server(
    place: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_account(monkeypatch, tmp_path)
    netrc = tmp_path / (".netrc" if place == "netrc" else "own_netrc")
    netrc.write_text("machine api.wandb.ai login user password " + "0" * 40)
    netrc.chmod(0o600)
    variables = {"variable": {"WANDB_API_KEY": "0" * 40}, "named": {"NETRC": str(netrc)}}
    for name, value in variables.get(place, {}).items():
        monkeypatch.setenv(name, value)
    mode = {"offline": "offline", "unset": "auto"}.get(place, "online")
    options = world.overrides(tmp_path / "run", "sft", "logger=[csv,wandb]", f"logger.wandb.mode={mode}")
    assert set(make_settings(compose_config("train", options)).logger) == {"csv", "wandb"}


def no_account(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Neither key nor mode of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))


def test_an_objective_that_is_given_is_taken_or_refused(world: World, tmp_path: Path) -> None:
    def settings(*overrides: str) -> Any:
        return make_settings(
            compose_config("train", world.overrides(tmp_path / "run", "kd", "evaluation=default", *overrides))
        )

    assert settings().metric == "val/rougeL"
    assert settings("evaluation.scorer=final_number").metric == "val/final_number"
    assert settings("objective=val/exact_match").metric == "val/exact_match"
    assert settings("evaluation=none").metric == "val/loss"
    assert settings("data.val=null", "data.val_size=0").metric == "train/loss"
    for overrides, said in (
        (["evaluation.scorer=final_number"], "evaluation.scorer=final_number gives val/final_number"),
        (["evaluation=none"], "this run generates no answers"),
        (["data.val=null", "data.val_size=0"], "there is no validation data"),
    ):
        (problem,) = told(world, tmp_path, "evaluation=default", "objective=val/rougeL", *overrides)
        assert problem.startswith("objective is val/rougeL, but ")
        assert said in problem


def test_the_config_of_a_run_makes_its_settings_again(world: World, tmp_path: Path) -> None:
    settings = make_settings(
        compose_config("train", world.overrides(tmp_path / "run", "delta_kd", "model/lora=default"))
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(dict(settings.record)), encoding="utf-8")
    again = stored_settings(file)
    assert again.record == settings.record
    for group in ("model", "specs", "data", "trainer", "strategy", "kernels", "reference", "evaluation", "optim"):
        assert getattr(again, group) == getattr(settings, group), group
    assert (again.metric, again.loss_name) == (settings.metric, settings.loss_name) == ("val/loss", "delta_kd")


def test_every_target_of_our_configs_says_the_types_of_its_arguments() -> None:
    targets: dict[str, set[str]] = {}

    def collect(node: Any) -> None:
        if isinstance(node, dict):
            if "_target_" in node:
                given = {key for key in node if not key.startswith("_")} - {"defaults"}
                targets.setdefault(node["_target_"], set()).update(given)
            for value in node.values():
                collect(value)

    for file in CONF_DIR.rglob("*.yaml"):
        collect(OmegaConf.to_container(OmegaConf.load(file)))
    ours = {target: keys for target, keys in targets.items() if target.startswith("deltakd.")}
    assert len(ours) > 30
    for target, keys in ours.items():
        assert get_object(target)
        assert keys <= set(argument_hints(target)), target


def test_templates_patterns_and_seeds_are_checked_with_the_rest(world: World, tmp_path: Path) -> None:
    found = told(
        world, tmp_path, "data.template=alpacca", "evaluation.template={a: b}", "evaluation.strip='('",
        f"seed={2**32}", f"evaluation.seeds=[{2**32}]", "data.columns={answers: x}",
    )  # fmt: skip
    said = "\n".join(found)
    assert "data.template: unknown template 'alpacca'; allowed: alpaca, chat, or a mapping" in said
    assert "evaluation.strip is '(', which is not a regular expression" in said
    assert "seed is 4294967296; it must be a whole number from 0 to 4294967295" in said
    assert "evaluation.seeds is [4294967296]; it must be a list (each a whole number from 0 to 4294967295)" in said
    assert "data.columns has 'answers', which is not a key of ours" in said


def test_what_a_stream_needs_is_said_at_once(world: World, tmp_path: Path) -> None:
    options = ["trainer.max_steps=null", "trainer.max_epochs=0.5", "data.val_size=3", "data.train_subset='a.json#b'"]
    options += ["data.max_tokens_per_batch=100", "data.batch_size=null", "reference=cached", "reference.path=x"]
    found = "\n".join(told(world, tmp_path, "data.streaming=true", *options))
    for part in (
        "hold rows out in a separate file: data.val=... data.val_size=0",
        "data.train_subset names lines of an indexed file",
        "data.max_tokens_per_batch is 100, but a row may have data.max_length=120 tokens",
        "give reference=live, or data.streaming=false",
        "the schedules need to know the last one; give trainer.max_steps=N",
        "trainer.max_epochs is 0.5",
        "give trainer.val_every_n_steps=N",
    ):
        assert part in found
    assert told(world, tmp_path, "data.streaming=true", "data.train=nowhere/*.parquet", "data.val=null") == [
        "data.train: nowhere/*.parquet matches no file that can be read (.jsonl, .json, .csv, .tsv, .txt, .parquet, "
        ".arrow; text also as .gz and .zst)"
    ]
