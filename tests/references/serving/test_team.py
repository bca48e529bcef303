"""A server of several processes answers as one does, however they hold the models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deltakd.config.build import make_serving_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError
from deltakd.references.serving.secret import TOKEN_VARIABLE
from deltakd.training.serving import open_served
from tests.distributed.processes import on_ranks
from tests.references.serving.servers import TOKEN, at
from tests.tiny import World, save_model

ROLES = ("student_raw", "teacher", "teacher_raw")


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of three models with a plan for tensor parallelism, two heads of keys to a rank."""
    root = tmp_path_factory.mktemp("models")
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "initializer_range": 0.3}
    names = ("student", "teacher", "teacher_raw")
    paths = [save_model(root / name, seed=i, family="qwen2", width=32, **shape) for i, name in enumerate(names)]
    return [f"model.{name}.path={path}" for name, path in zip(names, paths, strict=True)]


def request(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 200, (rows, 9), generator=torch.Generator().manual_seed(rows), dtype=torch.int32)
    mask = torch.ones(rows, 9, dtype=torch.bool)
    mask[rows // 2, 6:] = False
    trained = mask.clone()
    trained[:, :3] = False
    longest = int(mask.sum(1).max())
    tensors = {"input_ids": ids, "attention_mask": mask, "trained": trained}
    return {name: tensor[:, :longest] for name, tensor in tensors.items()}


def answers(overrides: list[str]) -> list[Mapping[str, list[list[float]]]]:
    """What the first process answers to requests of five rows and of one, for one role and for all."""
    if "LOCAL_RANK" in os.environ:
        os.environ |= {"TORCHELASTIC_RUN_ID": "team", "RANK": os.environ["LOCAL_RANK"]}
    team = open_served(make_serving_settings(compose_config("train", overrides))).team()
    if dist.is_initialized() and dist.get_rank() > 0:
        team.follow()
        return []
    found = []
    for rows, roles in ((5, ROLES), (5, ROLES[1:2]), (1, ROLES)):
        asked = request(rows)
        listed, tensors = team.run(roles, asked, team.checked(asked))
        found.append({role: tensors[name].tolist() for role, name in listed.items()})
        team.wait()
    team.stop()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("options", [("replicate",), ("shard",), ("tensor",), ("shard", "data.packing=true")])
def test_two_processes_answer_as_one(world: World, tmp_path: Path, models: list[str], options: tuple[str, ...]) -> None:
    """One of them has no row of the last request."""
    overrides = world.overrides(tmp_path, "delta_kd", *models, *at(tmp_path), "trainer.accelerator=cpu")
    expected = answers(overrides)
    more = [f"reference.sharding={options[0]}", *options[1:]]
    found, nothing = on_ranks(2, answers, [*overrides, *more])
    assert nothing == []
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for role, hidden in theirs.items():
            torch.testing.assert_close(torch.tensor(ours[role]), torch.tensor(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("reference.sharding=tensor", "model.teacher.adapter=x"), "splits plain models only; give .*sharding=shard"),
        (
            ("reference.sharding=shard", "model.teacher.quantization={quant_method: quanto, weights: int8}"),
            "quantised weights can't be split over processes; give reference.sharding=replicate",
        ),
    ],
)
def test_models_that_can_not_be_split_are_named(
    world: World, tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_serving_settings(compose_config("train", world.overrides(tmp_path, "kd", *at(tmp_path), *options)))


def test_tensor_parallelism_needs_several_processes(world: World, tmp_path: Path) -> None:
    options = ("reference.sharding=tensor", "trainer.accelerator=cpu")
    settings = make_serving_settings(compose_config("train", world.overrides(tmp_path, "kd", *at(tmp_path), *options)))
    with pytest.raises(ValueError, match=r"this server is one; start it with `torchrun --nproc-per-node N"):
        open_served(settings)
