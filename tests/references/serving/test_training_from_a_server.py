"""Training runs whose references a server runs."""

from __future__ import annotations

import csv
import os
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError, LostServerError, RefusedError
from deltakd.io.run_directory import RunDirectory
from deltakd.references.serving.secret import TOKEN_VARIABLE
from deltakd.references.serving.team import Team
from deltakd.training.callbacks.checkpoints import read_checkpoint
from deltakd.types import Batch
from tests.references.serving.servers import TOKEN, at, die_after, serving
from tests.rollouts.runs import column
from tests.tiny import World, make_rows, write_rows

Train = Callable[..., RunDirectory]

STREAM = ("data.streaming=true", "trainer.val_every_n_steps=3")
ON_POLICY = ("rollout=student", "rollout.decoding.max_new_tokens=6", "optim.lr=0.003")


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder whose name is short enough for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def in_two_tasks(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row | {"task": "ab"[number % 3 > 1]} for number, row in enumerate(rows)]


def curves(run: RunDirectory) -> list[list[str]]:
    with (run.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = sorted(name for name in rows[0] if name.startswith(("train/loss", "train/grad", "val/")))
    return [[row[name] for name in shown] for row in rows]


def losses(run: RunDirectory) -> list[list[float]]:
    return [column(run, name) for name in ("train/loss", "train/grad_norm", "val/loss")]


def student(run: RunDirectory) -> bytes:
    return (run.student / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (
            "delta_kd",
            (
                "trainer.accumulate_grad_batches=3",
                "data.batch_size=2",
                "trainer.val_every_n_steps=2",
                "reference.transport=gloo",
            ),
        ),
        (
            "parallelogram",
            ("data.packing=true", "reference.ahead=5", "model.teacher.dtype=bfloat16", "reference.transport=socket"),
        ),
        ("delta_kd", ("model/lora=default", "reference.ahead=0")),
        ("kd", (*ON_POLICY, "trainer.accumulate_grad_batches=2", "data.batch_size=2")),
    ],
)
def test_a_run_is_bitwise_the_same_as_beside_its_references(
    world: World, train: Train, place: Path, loss: str, options: tuple[str, ...]
) -> None:
    alone = [option for option in options if not option.startswith("reference")]
    live = train(loss, *alone, name="live")
    with serving(world.overrides(place, loss, *options, *at(place))):
        served = train(loss, *options, *at(place), name="served")
    assert curves(served) == curves(live)
    assert student(served) == student(live)
    assert served.read_summary()["meta"]["parameters"].keys() == {"student"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(*STREAM, "data.packing=true", "reference.ahead=5"), (*ON_POLICY, "data.val=null")]
)
def test_each_pair_of_teachers_is_asked_for_the_rows_of_its_tasks_alone(
    world: World, train: Train, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    data = [
        f"data.{name}={write_rows(tmp_path / f'{name}.jsonl', in_two_tasks(make_rows(n, n)))}"
        for name, n in (("train", 20), ("val", 8))
    ]
    second = {"teacher_2": "student_raw", "teacher_raw_2": "teacher_raw"}
    paths = [f"+model.{role}.path={world.root / path}" for role, path in second.items()]
    routed = (*data, "model.routes={a: 1, b: 2}", *paths, *options, "evaluation.measures.rows=8")
    ran: list[tuple[list[str], int]] = []
    real = Team.run

    def run(team: Team, roles: Collection[str], request: Any, batch: Batch) -> Any:
        ran.append((sorted(roles), len(batch.row_ids)))
        return real(team, roles, request, batch)

    monkeypatch.setattr(Team, "run", run)
    alone = [option for option in routed if not option.startswith("reference")]
    live = train("delta_kd", *alone, name="live")
    with serving(world.overrides(place, "delta_kd", *routed, *at(place))):
        served = train("delta_kd", *routed, *at(place), name="served")
    assert losses(served) == losses(live)
    assert student(served) == student(live)
    mine, its = served.read_summary(), live.read_summary()
    measured = [name for name in its if name.startswith(("val/a/", "val/b/"))]
    # Beside the student, a measured batch is never packed.
    expected = {name: its[name] for name in measured}
    assert {name: mine[name] for name in measured} == pytest.approx(expected, rel=1e-5)
    assert bool(measured) == ("data.val=null" not in options)
    asked = {tuple(roles) for roles, _ in ran}
    assert asked == {("student_raw",), ("teacher", "teacher_raw"), ("teacher_2", "teacher_raw_2")}
    rows = {role: sum(n for roles, n in ran if role in roles) for role in ("student_raw", "teacher", "teacher_2")}
    assert rows["teacher"] + rows["teacher_2"] == rows["student_raw"]


@pytest.mark.parametrize("requests", [6, *(pytest.param(number, marks=pytest.mark.slow) for number in (7, 8))])
def test_a_run_whose_server_dies_stops_saved_and_goes_on_when_it_is_back(
    world: World, train: Train, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    """In the first, a middle or the last micro-batch of a step."""
    options = ("trainer.accumulate_grad_batches=3", "data.batch_size=2", "data.val=null", "reference.ahead=0")
    live = train("delta_kd", *options[:-1], name="live")
    asking = (*options, *at(place))
    with monkeypatch.context() as patched, serving(world.overrides(place, "delta_kd", *asking)):
        die_after(requests, patched)
        with pytest.raises(
            LostServerError, match=r"references unix://.* is gone \(.*reference.wait_s=0 .*deltakd.serve"
        ):
            train("delta_kd", *asking, name="served")
    state = read_checkpoint(tmp_path / "served" / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 2
    with serving(world.overrides(place, "delta_kd", *asking)):
        served = train("delta_kd", *asking, "resume=true", name="served")
    assert curves(served) == curves(live)
    assert student(served) == student(live)


def test_a_run_waits_for_its_server_and_goes_on_as_if_nothing_had_happened(
    world: World, train: Train, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("data.batch_size=2", "trainer.val_every_n_steps=3")
    live = train("delta_kd", *options, name="live")
    asking = [*options, *at(place), "reference.wait_s=60", "reference.transport=gloo"]
    overrides = world.overrides(place, "delta_kd", *asking)
    runs: list[RunDirectory] = []
    with monkeypatch.context() as patched, serving(overrides) as server:
        die_after(5, patched)
        trainer = threading.Thread(target=lambda: runs.append(train("delta_kd", *asking, name="served")))
        trainer.start()
        while not server.stopped:
            time.sleep(0.05)
    with serving(overrides):
        trainer.join()
    assert curves(runs[0]) == curves(live)
    assert student(runs[0]) == student(live)
    said = [record.getMessage() for record in caplog.records if "server of references" in record.getMessage()]
    assert [("is gone" in sentence, "is back" in sentence) for sentence in said] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ("model.teacher.path={root}/student_raw", r"model.teacher is .*student_raw .*was started with .*teacher \("),
        ("model.teacher.dtype=bfloat16", "model.teacher.dtype is bfloat16, but the server .* was started with float32"),
        ("data.packing=true", "data.packing is True, but the server"),
    ],
)
def test_a_server_of_other_references_is_refused_by_name(
    world: World, train: Train, place: Path, changed: str, sentence: str
) -> None:
    with (
        serving(world.overrides(place, "delta_kd", *at(place))),
        pytest.raises(ConfigError, match=sentence),
    ):
        train("delta_kd", *at(place), changed.format(root=world.root))


def test_roles_that_the_server_does_not_hold_are_refused_by_name(world: World, train: Train, place: Path) -> None:
    with (
        serving(world.overrides(place, "kd", *at(place))),
        pytest.raises(RefusedError, match="it holds teacher, but the run asks for student_raw, teacher_raw"),
    ):
        train("delta_kd", *at(place))


def test_a_server_without_the_memory_that_is_asked_for_is_named(
    world: World, train: Train, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with (
        serving(world.overrides(place, "kd", *at(place))),
        pytest.raises(RefusedError, match=r"reference.transport=shared_memory: .*the server has none; give .*auto"),
    ):
        train("kd", *at(place), "reference.transport=shared_memory")


def test_another_token_ends_the_run_at_once(
    world: World, train: Train, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(world.overrides(place, "kd", *at(place))):
        monkeypatch.setenv(TOKEN_VARIABLE, "another token of the tests")
        with pytest.raises(RefusedError, match="the token does not match"):
            train("kd", *at(place), "reference.wait_s=60")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("loss=uld",), "the loss aligns them with those of another tokenizer"),
        (("rollout=student", "rollout.source=mixture"), "rollout.source=mixture runs the teacher token by token"),
        (("reference.url=localhost:5",), "reference.url is 'localhost:5'; it must be"),
    ],
)
def test_what_does_not_go_is_said_before_anything_is_loaded(
    world: World, tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    overrides = world.overrides(tmp_path, "kd", *at(tmp_path), *options)
    with pytest.raises(ConfigError, match=sentence):
        make_settings(compose_config("train", overrides))


def test_measures_of_the_student_ask_the_server(world: World, train: Train, place: Path) -> None:
    options = ("evaluation.measures.rows=8", "trainer.max_steps=2")
    live = train("delta_kd", *options, name="live").read_summary()
    with serving(world.overrides(place, "delta_kd", *at(place))):
        served = train("delta_kd", *options, *at(place), name="served").read_summary()
    named = [name for name in live if name.startswith("val/")]
    assert "val/kl_teacher" in named
    assert {name: served[name] for name in named} == {name: live[name] for name in named}
