"""``deltakd.cache``, and training runs from what it made."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from deltakd.cache import main, make_cache
from deltakd.io import files
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models import train_tokenizer
from deltakd.references import StoreError, fill
from deltakd.references.store import CacheStore
from deltakd.studies.stages import run_study
from deltakd.studies.study_file import read_study
from tests.references.runs import curves, run
from tests.tiny import World, make_rows, save_model, write_rows

#: Beyond the largest process id that Linux gives.
NO_PROCESS = 2**22 + 1
TOPK = ("reference.store=topk", "reference.k=64")


class Cached(NamedTuple):
    """A world whose references were cached and then removed."""

    world: World
    path: Path
    topk: Path
    bfloat16: Path

    def overrides(self, run_dir: Path, loss: str, *extra: str) -> list[str]:
        return self.world.overrides(run_dir, loss, "reference=cached", f"reference.path={self.path}", *extra)


@pytest.fixture(scope="module")
def cached(world: World, tmp_path_factory: pytest.TempPathFactory) -> Cached:
    root = tmp_path_factory.mktemp("cached")
    copy = World(root / "world")
    shutil.copytree(world.root, copy.root, ignore=shutil.ignore_patterns("sharp"))
    for role, seed in (("teacher", 3), ("teacher_raw", 2)):
        # Far from uniform, so that errors would show.
        save_model(copy.root / role, seed=seed, width=24, initializer_range=0.3)
    made = Cached(copy, root / "hidden", root / "topk", root / "bfloat16")
    for path, *options in (
        (made.path, "data.batch_size=3"),
        (made.topk, *TOPK),
        (made.bfloat16, "model.teacher.dtype=bfloat16"),
    ):
        make_cache(copy.overrides(root / "unused", "delta_kd", f"reference.path={path}", *options))
    for role in ("teacher", "teacher_raw"):
        (copy.root / role).rename(copy.root / f"{role}_moved")
    return made


def live_of(cached: Cached) -> list[str]:
    return [f"model.{role}.path={cached.world.root / f'{role}_moved'}" for role in ("teacher", "teacher_raw")]


def student(directory: RunDirectory) -> bytes:
    return (directory.student / "model.safetensors").read_bytes()


OTHER_RUN = (
    "data.batch_size=8", "delta_weight=0.6", "loss.temperature=2", "seed=3", "optim.eps=1e-4",
    "loss.divergence={_target_: deltakd.losses.SkewReverseKL}", "data.limit=20",
)  # fmt: skip


def test_hidden_serves_other_runs_with_the_losses_of_live_references(cached: Cached, tmp_path: Path) -> None:
    """Order, batch size, rows, α, τ, divergence and seed differ from what was cached; the references are gone."""
    live = run(cached.world.overrides(tmp_path / "live", "delta_kd", *OTHER_RUN, *live_of(cached)))
    runs = [run(cached.overrides(tmp_path / f"run{n}", "delta_kd", *OTHER_RUN)) for n in range(2)]
    assert len(curves(live)) > 6
    assert curves(runs[0]) == pytest.approx(curves(live), rel=1e-5)
    assert student(runs[0]) == student(runs[1])
    assert runs[0].read_summary()["meta"]["parameters"].keys() == {"student"}
    assert f"| teacher_raw | {cached.world.root / 'teacher_raw'} |" in (runs[0].student / "README.md").read_text()


def test_the_very_same_batches_are_bitwise_the_same(cached: Cached, tmp_path: Path) -> None:
    alone = ("data.batch_size=1", *live_of(cached))
    make_cache(cached.overrides(tmp_path / "unused", "delta_kd", *alone, f"reference.path={tmp_path / 'cache'}"))
    live = run(cached.world.overrides(tmp_path / "live", "delta_kd", *alone))
    mine = run(cached.overrides(tmp_path / "run", "delta_kd", *alone, f"reference.path={tmp_path / 'cache'}"))
    assert curves(mine) == curves(live)
    assert student(mine) == student(live)


def test_half_precision_is_kept_as_it_is(cached: Cached, tmp_path: Path) -> None:
    half = ("model.teacher.dtype=bfloat16", "optim.eps=1e-4")
    live = run(cached.world.overrides(tmp_path / "live", "delta_kd", *half, *live_of(cached)))
    mine = run(cached.overrides(tmp_path / "run", "delta_kd", *half, f"reference.path={cached.bfloat16}"))
    # Hidden states of other batches are rounded to bfloat16 from other last bits.
    assert curves(mine) == pytest.approx(curves(live), rel=2e-3)
    tensors = load_file(cached.bfloat16 / "heads.safetensors")
    dtypes = {name: t.dtype for name, t in tensors.items()}
    assert dtypes.pop("student_raw.weight") == torch.float32
    assert dtypes == {"teacher.weight": torch.bfloat16, "teacher_raw.weight": torch.bfloat16}


def test_a_lora_student_reads_its_base_from_the_cache(cached: Cached, tmp_path: Path) -> None:
    lora = ("model/lora=default", "optim.eps=1e-4")
    live = run(cached.world.overrides(tmp_path / "live", "delta_kd", *lora, *live_of(cached)))
    mine = run(cached.overrides(tmp_path / "run", "delta_kd", *lora))
    assert curves(mine) == pytest.approx(curves(live), rel=1e-5)


def test_topk_trains_near_the_exact_losses_and_serves_losses_that_read_less(cached: Cached, tmp_path: Path) -> None:
    topk = (f"reference.path={cached.topk}", "optim.eps=1e-4")
    for loss, *options in (("parallelogram", "delta_weight=0.5", "data.batch_size=7"), ("kd",)):
        live = run(cached.world.overrides(tmp_path / f"live_{loss}", loss, *options, *live_of(cached), *topk[1:]))
        mine = run(cached.overrides(tmp_path / f"run_{loss}", loss, *options, *topk))
        assert curves(mine) == pytest.approx(curves(live), rel=0.05)
        assert curves(mine) != pytest.approx(curves(live), rel=1e-4)
        summary = [directory.read_summary() for directory in (live, mine)]
        assert summary[1]["val/ce"] == pytest.approx(summary[0]["val/ce"], rel=0.02)


def test_topk_of_the_whole_vocabulary_is_exact(cached: Cached, tmp_path: Path) -> None:
    whole = ("reference.store=topk", "reference.k=5000", "reference.dtype=float32", "loss.temperature=1.5")
    options = (*live_of(cached), "optim.eps=1e-4")
    path = f"reference.path={tmp_path / 'cache'}"
    make_cache(cached.overrides(tmp_path / "unused", "delta_kd", *whole, path, *options))
    live = run(cached.world.overrides(tmp_path / "live", "delta_kd", "loss.temperature=1.5", *options))
    mine = run(cached.overrides(tmp_path / "run", "delta_kd", *whole, path, *options))
    assert curves(mine) == pytest.approx(curves(live), rel=1e-5)


def test_k_is_chosen_by_the_error_on_a_sample(cached: Cached, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ("reference.store=topk", *live_of(cached), "loss.ce_weight=0")
    path = f"reference.path={tmp_path / 'cache'}"
    with pytest.raises(ValueError, match=r"no K meets reference.target_error=1e-09 .*K = 300 .*store=hidden"):
        make_cache(cached.overrides(tmp_path, "delta_kd", *options, path, "reference.target_error=1e-9"))
    assert not (tmp_path / "cache").exists()
    with caplog.at_level("INFO"):
        summary = make_cache(cached.overrides(tmp_path, "delta_kd", *options, path, "reference.target_error=0.1"))
    errors = {e["k"]: max(e["loss_error"], e["gradient_error"]) for e in summary["sample"]}
    assert list(errors) == [8, 16, 32, 64, 128, 256, 300]
    assert summary["k"] == min(k for k, error in errors.items() if error <= 0.1)
    assert 8 < summary["k"] < 300
    assert all(0 < mass < 1 for mass in summary["sample"][0]["kept_mass"].values())
    assert summary["sample"][0]["kept_mass"].keys() == {"teacher", "teacher_raw", "student_raw"}
    shown = next(m for m in caplog.messages if f"K = {summary['k']} keeps a mass of teacher" in m)
    assert "its gradient by" in shown
    each = 2 * summary["k"] + 3 * 2 * (summary["k"] + 1)
    assert summary["bytes_per_token"] == each
    assert any(f"{each} bytes per valid token x {summary['tokens']} tokens" in m for m in caplog.messages)


REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "data.template is another one": ("hidden", ("data.template=alpaca",)),
    "data.max_length is 110, but the cache .* with 120": ("hidden", ("data.max_length=110",)),
    "data.overlong is drop": ("hidden", ("data.overlong=drop",)),
    "data.val_size is 6": ("hidden", ("data.val=null", "data.val_size=6")),
    r"model.teacher is .*student_raw \(sha256 [0-9a-f]{12}\), but .*teacher \(sha256": (
        "hidden", ("model.teacher.path={root}/student_raw",),
    ),
    "model.teacher.path is .*nowhere, but .* not here to compare": ("hidden", ("model.teacher.path={root}/nowhere",)),
    "model.teacher_raw.dtype is float16, but": ("hidden", ("model.teacher_raw.dtype=float16",)),
    "reference.store is topk, but .* with hidden": ("hidden", ("reference.store=topk",)),
    "reads teacher_2, teacher_raw_2, but .* made for teacher, teacher_raw, student_raw alone": (
        "hidden", ("loss=delta_multi_teacher",),
    ),
    "loss.temperature is 2.0, but .* with 1.0": ("topk", ("loss.temperature=2",)),
    "reference.k is 8, but .* with 64": ("topk", ("reference.k=8",)),
    "LogitMSE weighs all tokens .*hidden is exact": ("topk", ("loss=kd_logit_mse",)),
    "holds no cache of references; make it": ("nowhere", ()),
    "reference.path is missing": ("hidden", ("reference.path=null",)),
    r"(?s)6 problems:.*store is 'both'.*reference.k is 1;.*target_error is 2;.*dtype is 'int8'.*trainer.max_epochs": (
        "hidden",
        (
            "reference.path={root}", "reference.store=both", "reference.k=1", "reference.target_error=2",
            "reference.dtype=int8", "trainer.max_steps=null",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_by_its_name(cached: Cached, tmp_path: Path, message: str) -> None:
    where, changes = REFUSED[message]
    extra = [change.format(root=cached.world.root) for change in changes]
    overrides = cached.overrides(tmp_path / "run", "delta_kd", f"reference.path={cached.path.parent / where}", *extra)
    with pytest.raises(ConfigError, match=message):
        run(overrides)


def test_another_tokenizer_is_refused(cached: Cached, tmp_path: Path) -> None:
    other = train_tokenizer(["quite another text, with quite other pairs of letters"] * 3, 280)
    save_model(tmp_path / "student", seed=1, tokenizer=other)
    options = (f"model.student.path={tmp_path / 'student'}", "loss=kd")
    with pytest.raises(ConfigError, match=r"the student's tokenizer is another one \([0-9a-f]{12}\), but the cache"):
        run(cached.overrides(tmp_path / "run", "kd", *options))


def test_a_loss_without_references_and_a_config_without_a_cache(cached: Cached, tmp_path: Path) -> None:
    run(cached.overrides(tmp_path / "run", "sft", "trainer.max_steps=1", "reference.path=nowhere"))
    with pytest.raises(ConfigError, match="the loss reads no references, so there is nothing to cache"):
        make_cache(cached.overrides(tmp_path / "run", "sft", f"reference.path={tmp_path / 'c'}"))
    with pytest.raises(ConfigError, match=r"add reference=cached reference.path=DIR"):
        make_cache([*cached.world.overrides(tmp_path / "run", "kd"), "reference=live"])


def test_missing_rows_are_counted_listed_and_added(
    cached: Cached, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that was moved has the same rows; a longer one has rows that the cache lacks, until it grows by them."""
    rows = [json.loads(line) for line in (cached.world.root / "train.jsonl").read_text().splitlines()]
    data = write_rows(tmp_path / "train.jsonl", rows)
    shutil.copytree(cached.path, tmp_path / "cache")
    options = (f"data.train={data}", f"reference.path={tmp_path / 'cache'}", "trainer.max_steps=1")
    run(cached.overrides(tmp_path / "moved", "delta_kd", *options))
    write_rows(cached.world.root / "longer.jsonl", [*rows, *({**r, "instruction": "new"} for r in make_rows(10, 5))])
    shutil.copy(cached.world.root / "train.jsonl", tmp_path / "kept.jsonl")
    shutil.move(cached.world.root / "longer.jsonl", cached.world.root / "train.jsonl")
    here = (f"reference.path={tmp_path / 'cache'}", "trainer.max_steps=1")
    try:
        with pytest.raises(
            ConfigError, match=r"lacks 10 of 42 rows of data.train \(rows 40, 41, .*47, \.\.\.\); .* add"
        ):
            run(cached.overrides(tmp_path / "refused", "delta_kd", *here))
        with caplog.at_level("INFO"):
            summary = make_cache(cached.overrides(tmp_path / "x", "delta_kd", *here, *live_of(cached)))
        assert any("10 rows, and 0.00 KiB of output embeddings" in m for m in caplog.messages)
        assert summary["rows"] == 32 + 8 + 10
        run(cached.overrides(tmp_path / "longer", "delta_kd", *here))
    finally:
        shutil.copy(tmp_path / "kept.jsonl", cached.world.root / "train.jsonl")


def content_of(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != "summary.json"}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "SHARD_ROWS", 9)


def arguments(cached: Cached, path: Path, *extra: str) -> list[str]:
    chosen = (f"reference.path={path}", "data.batch_size=4", *live_of(cached), *extra)
    return cached.overrides(path, "delta_kd", *chosen)


@pytest.fixture(scope="module", params=["hidden", "topk"])
def whole(
    request: pytest.FixtureRequest, cached: Cached, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A cache of several shards, which nobody changes, and the arguments of its kind."""
    kind = list(TOPK) if request.param == "topk" else []
    path = tmp_path_factory.mktemp("whole") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill, "SHARD_ROWS", 9)
        make_cache(arguments(cached, path, *kind))
    assert len(list(path.glob("shard_*"))) == 5
    return path, kind


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_one_goes_on_and_ends_byte_for_byte_the_same(
    whole: tuple[Path, list[str]], cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kind = whole
    with monkeypatch.context() as patch:
        _stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(SystemExit) as stopped:
            main(arguments(cached, tmp_path / "parts", *kind))
    assert stopped.value.code == 130
    assert len(CacheStore.open(tmp_path / "parts").manifest.shards) == 2
    with pytest.raises(ConfigError, match=r"lacks .* of 32 rows of data.train .* and 8 of 8 rows of data.val"):
        run(cached.overrides(tmp_path / "run", "delta_kd", f"reference.path={tmp_path / 'parts'}", *live_of(cached)))
    # What was half written is written again.
    begun = files.path_beside(tmp_path / "parts" / "shard_00002.safetensors", process=NO_PROCESS)
    begun.write_bytes(b"x")
    make_cache(arguments(cached, tmp_path / "parts", *kind))
    assert content_of(tmp_path / "parts") == content_of(path)
    # A finished one is only read, and needs no models.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    gone = [o for o in arguments(cached, tmp_path / "parts", *kind) if not o.startswith("model.teacher")]
    make_cache(gone)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()} == before


def _stop_after(monkeypatch: pytest.MonkeyPatch, shards: int, error: BaseException) -> None:
    """Fail in the middle of writing the shard after this many."""
    sync: Callable[[int], None] = os.fsync

    def failing(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if name.startswith(f"shard_{shards:05d}.safetensors.") and name.endswith(files.PARTIAL):
            raise error
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)


@pytest.mark.usefixtures("small_shards")
def test_a_full_disk_leaves_whole_shards_and_says_what_to_do(
    whole: tuple[Path, list[str]], cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kind = whole
    message = (
        r"parts is full \(No space left on device\): 24 rows are stored, 16 need another .* same command continues"
    )
    with monkeypatch.context() as patch:
        _stop_after(patch, 3, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(StoreError, match=message):
            make_cache(arguments(cached, tmp_path / "parts", *kind))
    assert not list((tmp_path / "parts").glob("*.partial"))
    make_cache(arguments(cached, tmp_path / "parts", *kind))
    assert content_of(tmp_path / "parts") == content_of(path)


def test_too_little_room_is_told_before_anything_is_run(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(StoreError, match=r"needs [\d.]+ KiB more, and 0.01 KiB are free; make room"):
        make_cache(arguments(cached, tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.safetensors"))


@pytest.mark.usefixtures("small_shards")
def test_damaged_shards_are_named_and_made_again(
    whole: tuple[Path, list[str]], cached: Cached, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, kind = tmp_path / "damaged", whole[1]
    shutil.copytree(whole[0], path)
    good = content_of(path)
    flipped = bytearray(good["shard_00001.safetensors"])
    flipped[-7] ^= 1
    (path / "shard_00001.safetensors").write_bytes(flipped)
    (path / "shard_00003.safetensors").write_bytes(good["shard_00003.safetensors"][:-10])
    message = r"damaged: shard_00001.safetensors has another content .*; shard_00003.safetensors has \d+ bytes instead"
    reading = (f"reference.path={path}", *live_of(cached))
    with pytest.raises(StoreError, match=message):
        run(cached.overrides(tmp_path / "refused", "delta_kd", *reading))
    with pytest.raises(StoreError, match=message):
        make_cache(arguments(cached, path, *kind))
    with pytest.raises(StoreError, match=r"damaged: shard_00003.safetensors has \d+ bytes instead of \d+\. Make"):
        run(cached.overrides(tmp_path / "unverified", "delta_kd", *reading, "reference.verify=false"))
    kept = (path / "shard_00000.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        make_cache(arguments(cached, path, *kind, "reference.remake=true"))
    assert sum("it is made again" in m for m in caplog.messages) == 2
    assert content_of(path) == good
    assert (path / "shard_00000.safetensors").stat().st_mtime_ns == kept


def test_a_study_makes_it_once_for_all_its_runs(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = ("run_dir=", "loss=")
    reading = ["reference=cached", "reference.path=outputs/tiny/references"]
    content = {
        "name": "tiny",
        "overrides": [o for o in world.overrides(tmp_path, "kd") if not o.startswith(own)],
        "stages": {
            "references": {"command": "cache", "overrides": ["loss=delta_kd"]},
            "kd": {"overrides": ["loss=kd", *reading]},
            "delta_kd": {"overrides": ["loss=delta_kd", *reading]},
        },
        "table": {"columns": ["val/loss"]},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def shown() -> str:
        output = io.StringIO()
        run_study(read_study(tmp_path), Console(file=output, width=120))
        return output.getvalue()

    first = shown()
    assert "[1/3] references: 40 rows, 386 tokens, " in first
    assert "references" not in first[first.index("┏") :]
    assert shown().count("finished before") == 3
    content["stages"]["references"]["overrides"] += ["model.teacher.dtype=float16"]  # type: ignore[index]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ConfigError, match=r"model.teacher.dtype is float16, but the cache"):
        shown()


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(cached: Cached, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]

    def command(*extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "deltakd.cache", *cached.world.overrides(tmp_path, "kd", *live_of(cached), *extra)],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = command("+reference.path=c")
    assert done.returncode == 0, done.stderr
    assert "96 bytes per valid token x 386 tokens (train 319, val 67) in 40 rows" in done.stderr
    assert "A training reads it with reference=cached reference.path=c." in done.stderr
    manifest: dict[str, Any] = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["content"]["models"].keys() == {"teacher"}
    assert len(manifest["content"]["models"]["teacher"]["sha256"]) == 64
