"""Teachers by task, whose hidden states or log-probs come from a cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from deltakd.cache import make_cache
from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.data import collate
from deltakd.data.encoding.encoded_set import EncodedSet, RowTasks
from deltakd.evaluation import measured_references
from deltakd.io.errors import ConfigError
from deltakd.references.index import keys_of_batch, keys_of_set
from deltakd.references.store import OFFSETS, ROW_KEYS, CacheStore, map_arrays
from tests.references.runs import curves, run
from tests.tiny import World, make_rows, save_model, write_rows

ROUTES = "model.routes={long: 1, short: 2}"


class Routed(NamedTuple):
    """A world with rows of two tasks and a pair of teachers for each, and caches of them."""

    world: World
    root: Path
    hidden: Path
    topk: Path

    def overrides(self, run_dir: Path, *extra: str) -> list[str]:
        data = [f"data.{name}={self.root / name}.jsonl" for name in ("train", "val")]
        second = [f"+model.{role}.path={self.root / role}" for role in ("teacher_2", "teacher_raw_2")]
        base = [ROUTES, *data, *second, f"model.student.path={self.root / 'student'}", "optim.eps=1e-4"]
        base += ["trainer.max_steps=4"]
        return self.world.overrides(run_dir, "delta_kd", *base, *extra)

    def cached(self, run_dir: Path, *extra: str) -> list[str]:
        return self.overrides(run_dir, "reference=cached", f"reference.path={self.hidden}", *extra)


def with_tasks(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row | {"task": ("long", "short")[number % 2]} for number, row in enumerate(rows)]


@pytest.fixture(scope="module")
def routed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Routed:
    root = tmp_path_factory.mktemp("routed")
    # Dropout falls on other values of packed rows.
    save_model(root / "student", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    # Of another width than the first pair.
    for seed, role in enumerate(("teacher_2", "teacher_raw_2"), 7):
        save_model(root / role, seed=seed, width=16, initializer_range=0.3)
    write_rows(root / "train.jsonl", with_tasks(make_rows(20, 0)))
    write_rows(root / "val.jsonl", with_tasks(make_rows(6, 1)))
    made = Routed(world, root, root / "hidden", root / "topk")
    make_cache(made.cached(root / "unused"))
    whole = (f"reference.path={made.topk}", "reference.store=topk", "reference.k=5000", "reference.dtype=float32")
    make_cache(made.cached(root / "unused", *whole))
    return made


def test_equal_rows_of_two_tasks_have_keys_of_their_own() -> None:
    ids, offsets, tasks = np.array([5, 6] * 3, np.int32), np.array([0, 2, 4, 6]), np.array([0, 1, 2], np.int32)
    encoded = EncodedSet(ids, ids, offsets, np.arange(3), tasks=RowTasks(tasks, ("a", "b", None), (1, 2, 2)))
    keys = keys_of_set(encoded)
    assert (keys[1] == keys[2]).all()
    assert (keys[0] != keys[1]).any()
    assert (keys_of_batch(collate([encoded[row] for row in (1, 0, 2)], 0, 0, 0)) == keys[[1, 0, 2]]).all()
    without = keys_of_set(replace(encoded, tasks=None))
    assert not any((without[0] == key).all() for key in keys)


@pytest.mark.slow
def test_the_cache_says_which_models_judge_which_task(routed: Routed) -> None:
    store = CacheStore.open(routed.hidden)
    content = store.manifest.content
    assert content["routes"] == {"long": 1, "short": 2}
    assert content["models"].keys() == {"teacher", "teacher_raw", "teacher_2", "teacher_raw_2", "student_raw"}
    assert content["models"]["teacher_2"]["path"] == str(routed.root / "teacher_2")
    # The first pair's two models are 24 wide; the second's, and the raw student, 16.
    assert content["bytes_of_pair"] == {"1": 4 * (24 + 24 + 16), "2": 4 * 3 * 16}
    of_pairs = [{"teacher", "teacher_raw", "student_raw"}, {"teacher_2", "teacher_raw_2", "student_raw"}]
    held = [map_arrays(store.path / shard.file).keys() - {ROW_KEYS, OFFSETS} for shard in store.manifest.shards]
    assert sorted(held, key=sorted) == sorted([*of_pairs, *of_pairs], key=sorted)  # of two sets
    assert json.loads((routed.hidden / "summary.json").read_text())["routes"] == content["routes"]


@pytest.mark.slow
def test_both_stores_train_with_the_losses_of_live_references(routed: Routed, tmp_path: Path) -> None:
    """The stored support is the whole vocabulary, so that both are exact; the batches are not those of the cache.

    Packed rows give the same.
    """
    live = curves(run(routed.overrides(tmp_path / "live")))
    assert len(live) > 4
    packing = "data.packing=true"
    assert curves(run(routed.overrides(tmp_path / "packed", packing))) == pytest.approx(live, rel=1e-5)
    for path, extra in ((routed.hidden, [packing]), (routed.topk, [])):
        mine = run(routed.cached(tmp_path / path.name, f"reference.path={path}", *extra))
        assert curves(mine) == pytest.approx(live, rel=1e-5)
        assert mine.read_summary()["meta"]["parameters"].keys() == {"student"}


@pytest.mark.slow
def test_the_very_same_batches_are_bitwise_the_same(routed: Routed, tmp_path: Path) -> None:
    path, alone = tmp_path / "cache", ("data.batch_size=1",)
    make_cache(routed.cached(tmp_path / "unused", *alone, f"reference.path={path}"))
    live = run(routed.overrides(tmp_path / "live", *alone))
    mine = run(routed.cached(tmp_path / "run", *alone, f"reference.path={path}"))
    assert curves(mine) == curves(live)
    weights = [(one.student / "model.safetensors").read_bytes() for one in (live, mine)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_each_task_is_measured_from_the_cache(routed: Routed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measures = ("evaluation.measures.rows=6", "trainer.max_steps=2")
    live = run(routed.overrides(tmp_path / "live", *measures)).read_summary()

    def loads(role: str, *_: object) -> None:
        raise AssertionError(f"{role} was loaded")

    monkeypatch.setattr(measured_references, "open_reference", loads)
    mine = run(routed.cached(tmp_path / "run", *measures)).read_summary()
    names = [name for name in live if name.startswith("val/") and name.endswith(("kl_teacher", "shift_correlation"))]
    assert {"val/long/kl_teacher", "val/short/kl_teacher", "val/short/shift_correlation"} <= set(names)
    assert {name: mine[name] for name in names} == pytest.approx({name: live[name] for name in names}, rel=1e-3)
    assert mine["meta"]["measured"]["val/short"]["references"] == "cached"


@pytest.mark.slow
def test_the_errors_of_a_few_tokens_are_those_of_the_worst_pair(routed: Routed, tmp_path: Path) -> None:
    """Each pair's are those of a cache of its own rows alone, without routes; K meets the target for both."""
    few = ("reference.store=topk", "reference.k=64", "reference.dtype=float32", "data.val=null")
    rows = [json.loads(line) for line in (routed.root / "train.jsonl").read_text().splitlines()]
    alone = {}
    for task, suffix in (("long", ""), ("short", "_2")):
        data = write_rows(tmp_path / f"{task}.jsonl", [row for row in rows if row["task"] == task])
        root = routed.root if suffix else routed.world.root
        pair = [f"model.{role}.path={root / (role + suffix)}" for role in ("teacher", "teacher_raw")]
        extra = (*few, "model.routes=null", f"data.train={data}", *pair, f"reference.path={tmp_path / task}")
        [alone[task]] = make_cache(routed.cached(tmp_path / "unused", *extra))["sample"]
    together = (*few, f"reference.path={tmp_path / 'both'}")
    [both] = make_cache(routed.cached(tmp_path / "unused", *together))["sample"]
    for name in ("loss_error", "gradient_error"):
        assert both[name] == pytest.approx(max(one[name] for one in alone.values()), rel=1e-2)
    assert alone["long"]["loss_error"] != pytest.approx(alone["short"]["loss_error"], rel=0.1)
    assert both["kept_mass"]["teacher_2"] == pytest.approx(alone["short"]["kept_mass"]["teacher"], abs=1e-5)
    target = max(both["loss_error"], both["gradient_error"])
    wanted = ("reference.k=null", f"reference.target_error={1.01 * target:g}", f"reference.path={tmp_path / 'target'}")
    assert make_cache(routed.cached(tmp_path / "unused", *few, *wanted))["k"] <= 64


REFUSED: dict[str, tuple[str, ...]] = {
    r"model.routes.short is 1 \(teacher and teacher_raw\), but the cache .* with 2 \(teacher_2 and teacher_raw_2\)": (
        "model.routes={long: 1, short: 1}",
    ),
    r"(?s)model.routes.\* is 2 .* with absent; .*model.routes.short is absent, but .* with 2 ": (
        "model.routes={long: 1, *: 2}",
    ),
    r"model.routes is null, but the cache .* with \{long: 1, short: 2\}": ("model.routes=null",),
    "model.teacher_2 is .*student_raw .* with .*teacher_2": ("+model.teacher_2.path=ROOT/student_raw",),
    "model.routes chooses among models that are loaded, and reference.url gives one": (
        "reference.url=http://127.0.0.1:1", "loss=kd",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("message", REFUSED)
def test_what_judged_otherwise_is_refused_by_its_name(routed: Routed, tmp_path: Path, message: str) -> None:
    extra = [change.replace("ROOT", str(routed.world.root)) for change in REFUSED[message]]
    with pytest.raises(ConfigError, match=message):
        make_settings(compose_config("train", routed.cached(tmp_path, *extra)))


@pytest.mark.slow
def test_a_row_whose_task_changed_is_named_with_both_pairs(routed: Routed, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (routed.root / "val.jsonl").read_text().splitlines()]
    short = next(number for number, row in enumerate(rows) if row["task"] == "short")
    rows[short]["task"] = "long"
    content = (routed.root / "val.jsonl").read_text()
    try:
        write_rows(routed.root / "val.jsonl", rows)
        with pytest.raises(ConfigError, match=rf"rows {short} \(long: judged by pair 1 here, by pair 2 there\).* back"):
            run(routed.cached(tmp_path / "run"))
    finally:
        (routed.root / "val.jsonl").write_text(content)


def test_what_routes_hold_is_said() -> None:
    """A task's name is a text, whatever YAML takes it for."""
    said = r"model.routes is \{'0': 1, 'true': \{'teacher': 'x'\}\}; .* mapping \(each value a whole number from 1\)"
    with pytest.raises(ConfigError, match=said):
        make_settings(compose_config("train", ["model.routes={0: 1, true: {teacher: x}}"]))
