"""Teachers by task: each row is judged by its own pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.data.batches.packed_rows import pack_rows
from deltakd.data.encoding.encoded_set import EncodedSet
from deltakd.data.routing import with_tasks
from deltakd.data.sources.rows import Row
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.losses.distillation import Distillation
from deltakd.models import LanguageModel, ModelSettings, ModelSpec
from deltakd.models.roles import open_model, open_tokenizer
from deltakd.references import LiveReferences, RoutedReferences
from deltakd.references.routed import routed_roles
from deltakd.report import preservation_of
from deltakd.training.assembly import open_references, read_vocabularies
from deltakd.training.step import DistillationStep
from deltakd.types import IGNORE_INDEX, Batch
from tests.tiny import World, make_rows, save_model, write_rows

V = 300
Train = Callable[..., RunDirectory]


def open_alone(path: Path, seed: int, width: int = 16) -> LanguageModel:
    save_model(path, seed=seed, vocab_size=V, width=width)
    return open_model("teacher", ModelSpec(str(path)), ModelSettings(), vocabulary=V).eval()


def make_batch(rows: list[int] | None = None) -> Batch:
    """Four rows of unequal length; or some of them, as a batch of their own."""
    ids = torch.randint(3, V, (4, 9), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :3] = IGNORE_INDEX
    for row, length in enumerate((9, 6, 8, 5)):
        labels[row, length:], mask[row, length:] = IGNORE_INDEX, 0
    chosen = torch.tensor(range(4) if rows is None else rows)
    return Batch(ids[chosen], mask[chosen], labels[chosen], chosen, 0, 20)


def delta_kd() -> Distillation:
    loss: Distillation = instantiate(compose_config("train", ["loss=delta_kd"]).loss)
    return loss


def test_each_row_is_judged_by_its_own_pair_with_values_and_gradients(tmp_path: Path) -> None:
    """The routed sum is the sum over the batches that hold one pair's rows each, padded or packed, in float64.

    Pairs may differ in width.
    """
    models = {
        role: open_alone(tmp_path / role, seed, width).double()
        for seed, (role, width) in enumerate(
            {"teacher": 16, "teacher_raw": 16, "teacher_2": 24, "teacher_raw_2": 24, "student_raw": 16}.items()
        )
    }
    student, loss = open_alone(tmp_path / "student", 9).double(), delta_kd()
    expected = torch.zeros(())
    for suffix, rows in (("", [0, 2]), ("_2", [1, 3])):
        own = {"teacher": models[f"teacher{suffix}"], "teacher_raw": models[f"teacher_raw{suffix}"]}
        references = LiveReferences(own | {"student_raw": models["student_raw"]})
        value, _ = DistillationStep(student, references, loss)(make_batch(rows))
        value.backward()
        expected = expected + value
    gradients = {name: p.grad for name, p in student.named_parameters()}
    routed = RoutedReferences(LiveReferences(models), loss.requires, (1, 2))
    padded, packed = (make_batch().routed((1, 2, 1, 2)) for _ in range(2))
    for batch in (padded, pack_rows(packed, 12)):
        student.zero_grad()
        total, parts = DistillationStep(student, routed, loss)(batch)
        total.backward()
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
        assert sum(parts.values()) != 0
        for name, p in student.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-12)
    found = [route.stream.packed for route in packed.routes]
    assert [one and (*one.input_ids.shape, one.longest) for one in found] == [(2, 9, 9), (1, 11, 6)]


def test_a_batch_of_one_task_runs_only_its_own_teachers(tmp_path: Path) -> None:
    models = {role: open_alone(tmp_path / role, seed) for seed, role in enumerate(("teacher", "teacher_2"))}
    ran: list[str] = []
    for role, model in models.items():
        model.register_forward_hook(lambda *_, role=role: ran.append(role))
    references = RoutedReferences(LiveReferences(models), {"teacher"}, (1, 2))
    [(tokens, heads)] = references(make_batch().routed((2, 2, 2, 2))).parts
    assert ran == ["teacher_2"]
    assert tokens.tolist() == list(range(len(heads["teacher"])))


def test_routes_need_the_teachers_of_every_pair_and_one_raw_student() -> None:
    assert routed_roles({"teacher", "teacher_raw", "student_raw"}, (2, 1, 2)) == [
        "teacher",
        "teacher_raw",
        "teacher_2",
        "teacher_raw_2",
        "student_raw",
    ]


def write_tasks(path: Path, n: int, seed: int) -> Path:
    rows = [row | {"task": ("long", "short")[len(row["response"]) < 12]} for row in make_rows(n, seed)]
    return write_rows(path, rows)


@pytest.mark.slow
def test_a_run_with_two_pairs_scores_and_measures_each_task(world: World, train: Train, tmp_path: Path) -> None:
    data = {
        name: write_tasks(tmp_path / f"{name}.jsonl", n, seed)
        for seed, (name, n) in enumerate({"train": 40, "val": 12, "test": 10}.items())
    }
    second = {"teacher_2": "teacher_raw", "teacher_raw_2": "teacher_raw"}
    run = train(
        "delta_kd",
        f"data.train={data['train']}",
        f"data.val={data['val']}",
        "model.routes={long: 1, short: 2}",
        *(f"+model.{role}.path={world.root / path}" for role, path in second.items()),
        "evaluation=default",
        f"evaluation.sets={{test: {{source: {data['test']}}}}}",
        "evaluation.generate=true",
        "evaluation.seeds=[1]",
        "evaluation.measures.rows=12",
    )
    summary = run.read_summary()
    names = {name for name in summary if name.startswith(("val/", "test/"))}
    assert {f"{s}/{t}/kl_teacher" for s in ("val", "test") for t in ("long", "short")} <= names
    assert {"test/long/rougeL", "test/short/rougeL", "test/rougeL", "val/kl_teacher"} <= names
    assert summary["meta"]["references"] == ["student_raw", "teacher", "teacher_2", "teacher_raw", "teacher_raw_2"]
    counts = {name: summary["meta"]["measured"][f"val/{name}"]["tokens"] for name in ("long", "short")}
    weighted = sum(summary[f"val/{name}/kl_teacher"] * tokens for name, tokens in counts.items())
    assert summary["val/kl_teacher"] == pytest.approx(weighted / sum(counts.values()), rel=1e-9)
    # The second pair has no shift: its teacher is its raw teacher.
    assert "val/short/shift_correlation" not in summary
    assert "val/long/shift_correlation" in summary
    # The report measures each row against its own pair, too.
    figures = preservation_of(run)
    assert figures.overall is not None
    groups = {"val": figures.overall} | {f"val/{task}": group for task, group in figures.by_task.items()}
    assert groups.keys() == {"val", "val/long", "val/short"}
    for name, group in groups.items():
        assert group.tokens == summary["meta"]["measured"][name]["tokens"]
        assert group.measures["kl_teacher"].mean == pytest.approx(summary[f"{name}/kl_teacher"], rel=1e-9)
    assert groups["val/short"].measures["correlation"].mean is None


def test_pairs_that_share_a_raw_teacher_share_its_weights(world: World, tmp_path: Path) -> None:
    second = {"teacher_2": "student_raw", "teacher_raw_2": "teacher_raw"}
    paths = [f"+model.{role}.path={world.root / path}" for role, path in second.items()]
    overrides = world.overrides(tmp_path, "delta_kd", "model.routes={long: 1, short: 2}", *paths)
    settings = make_settings(compose_config("train", overrides))
    tokenizer = open_tokenizer(settings.model, tmp_path / "tokenizer")
    opened = open_references(settings, tokenizer, read_vocabularies(settings, tokenizer))
    assert opened["teacher_raw_2"] is opened["teacher_raw"]
    # As the second teacher and the raw student do, by chance.
    assert opened["teacher_2"] is opened["student_raw"]
    assert len(opened) == 5
    assert len({id(model) for model in opened.values()}) == 3


def test_a_task_without_a_route_is_named_with_its_rows(world: World, train: Train, tmp_path: Path) -> None:
    data = write_tasks(tmp_path / "train.jsonl", 40, 0)
    second = [f"+model.{role}.path={world.root / 'teacher'}" for role in ("teacher_2", "teacher_raw_2")]
    with pytest.raises(ValueError, match=r"tasks that model\.routes lacks: (long|short) \(\d+ rows\)"):
        train("delta_kd", f"data.train={data}", "model.routes={long: 2, other: 2}", *second, name="a")
    with pytest.raises(ConfigError, match=r"model\.routes leads to teacher_2, which the config lacks"):
        train("delta_kd", f"data.train={data}", "model.routes={long: 1, short: 2}", name="b")
    with pytest.raises(ConfigError, match="the loss reads none"):
        train("sft", f"data.train={data}", "model.routes={long: 1}", name="c")


def test_tasks_are_known_without_routes_and_their_teachers_only_with_them() -> None:
    rows = [Row(7, "a", responses=("b",), task="x"), Row(3, "a", responses=("b",))]
    encoded = EncodedSet(np.zeros(4, np.int32), np.zeros(4, np.int32), np.array([0, 2, 4]), np.array([3, 7]))
    assert with_tasks(encoded, [Row(7, "a"), Row(3, "a")], None) is encoded
    tasks = with_tasks(encoded, rows, None).tasks
    assert tasks is not None
    assert [tasks.names[number] for number in tasks.numbers] == [None, "x"]
    assert not tasks.routed
    routed = with_tasks(encoded, rows, {"x": 2, "*": 3})
    assert [row.route for row in routed] == [3, 2]
