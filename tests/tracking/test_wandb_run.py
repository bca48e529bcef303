"""What W&B gets of a run, read back from the offline run: config, history, tables, artifacts; no home, no secret."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2 as pb

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models.identity import model_fingerprint
from deltakd.tracking import environment, wandb_run
from deltakd.tracking.redaction import redacted
from deltakd.training.run import run_training
from tests.tiny import World

KEY = "0123456789" * 4
BLOCK = 32768


def read_run(run: RunDirectory) -> list[Any]:
    """The records of an offline run; W&B's service writes the last ones a moment after ``finish`` has returned."""
    (path,) = run.path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        records = list(read_records(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise TimeoutError(f"{path} has no end")


def read_records(path: Path) -> Iterator[Any]:
    """What is in the file so far: LevelDB's log format after a head of 7 bytes."""
    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        if position + 7 + length > len(content):
            return
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found = pb.Record()
            found.ParseFromString(parts)
            parts = b""
            yield found


@pytest.fixture(scope="module")
def tracked(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunDirectory, list[Any]]]:
    """One short run below a home directory, with W&B offline, in a checkout with changes."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("WANDB_API_KEY", KEY)
        patch.delenv("WANDB_DATA_DIR", raising=False)
        patch.setattr(wandb_run, "git_changes", lambda: f"+ token = {KEY}\n+ path = {home}/data\n")
        yield _tracked(world, home)


def _tracked(world: World, home: Path) -> tuple[RunDirectory, list[Any]]:
    run = RunDirectory(home / "runs" / "a")
    (home / "train.jsonl").write_bytes((world.root / "train.jsonl").read_bytes())
    overrides = world.overrides(
        run.path,
        "delta_kd",
        "logger=[csv,wandb]",
        "logger.wandb.mode=offline",
        "logger.wandb.group=a_study",
        f"data.train={home / 'train.jsonl'}",
        "evaluation=default",
        f"evaluation.sets={{mine: {world.root / 'test.jsonl'}}}",
        "evaluation.seeds=[1,2]",
        "trainer.max_steps=4",
        "trainer.val_every_n_steps=2",
    )
    run_training(make_settings(compose_config("train", overrides)), run.path)
    return run, read_run(run)


def of_kind(records: list[Any], kind: str) -> list[Any]:
    return [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]


def history(records: list[Any]) -> list[dict[str, Any]]:
    return [{"/".join(i.nested_key): json.loads(i.value_json) for i in row.item} for row in of_kind(records, "history")]


def configuration(records: list[Any]) -> dict[str, Any]:
    updates = [u for r in of_kind(records, "run") for u in r.config.update]
    updates += [u for c in of_kind(records, "config") for u in c.update]
    return {u.key or u.nested_key[0]: json.loads(u.value_json) for u in updates}


def table(records: list[Any], run: RunDirectory, key: str) -> dict[str, Any]:
    """The last version of a table."""
    (folder,) = run.path.glob("wandb/offline-run-*")
    path = [row[f"{key}/path"] for row in history(records) if f"{key}/path" in row][-1]
    return json.loads((folder / "files" / path).read_text())


def test_numbers_of_training_and_validation(tracked: tuple[RunDirectory, list[Any]]) -> None:
    rows = history(tracked[1])
    trained = [row for row in rows if "train/loss" in row]
    assert [row["trainer/global_step"] for row in trained] == [1, 2, 3, 4]
    expected = "ce forward_kl grad_norm lr tokens_per_second padding_fraction memory_mib"
    assert {f"train/{name}" for name in expected.split()} <= trained[0].keys()
    validated = [row for row in rows if "val/rougeL" in row]
    assert [row["trainer/global_step"] for row in validated] == [2, 4]
    assert "val/rougeL_stderr" in validated[0]
    assert "mine/rougeL_stderr" in rows[-1] | rows[-2]


def test_config_group_commit_and_diff(tracked: tuple[RunDirectory, list[Any]]) -> None:
    run, records = tracked
    (started,) = of_kind(records, "run")
    assert started.run_group == "a_study"
    assert started.git.commit == (environment.git_commit() or "").removesuffix("-dirty")
    config = configuration(records)
    assert config["delta_weight"] == 1.0
    assert config["data"]["train"] == "~/train.jsonl"
    assert config["environment"]["git_commit"] == environment.git_commit()
    assert config["origin"]["models"]["teacher"]["sha256"] == model_fingerprint(config["model"]["teacher"]["path"])
    (folder,) = run.path.glob("wandb/offline-run-*")
    assert (folder / "files" / "diff.patch").read_text() == "+ token = ***\n+ path = ~/data\n"
    assert "diff.patch" in [f.path for r in of_kind(records, "files") for f in r.files]


def test_validation_answers_stand_side_by_side(tracked: tuple[RunDirectory, list[Any]]) -> None:
    run, records = tracked
    answers = table(records, run, "val/answers")
    assert answers["columns"] == ["row", "prompt", "reference", "step 2", "step 4"]
    assert len(answers["data"]) == 8
    stored = [json.loads(line) for line in (run.path / "validation" / "step_00000004.jsonl").read_text().splitlines()]
    assert [row[-1] for row in answers["data"]] == [r["output"] for r in stored]
    final = table(records, run, "mine/answers")
    assert final["columns"][3:] == ["output, seed 1", "ROUGE-L, seed 1", "output, seed 2", "ROUGE-L, seed 2"]


def test_the_student_is_an_artifact_with_its_lineage(tracked: tuple[RunDirectory, list[Any]]) -> None:
    run, records = tracked
    artifacts = {a.name: a for a in of_kind(records, "artifact")}
    config = configuration(records)
    (name,) = (n for n, a in artifacts.items() if a.type == "model")
    metadata = json.loads(artifacts[name].metadata)
    assert metadata["sha256"] == model_fingerprint(run.student)
    assert metadata["origin"]["data"]["sets"]["train"] == json.loads(run.summary.read_text())["meta"]["data_sha256"]
    files = {entry.path for entry in artifacts[name].manifest.contents}
    assert {"config.json", "README.md"} <= files
    assert not any(file.endswith(".safetensors") for file in files)
    for role in ("student", "teacher", "teacher_raw", "student_raw"):
        used = artifacts[f"model-{config['origin']['models'][role]['sha256'][:12]}"]
        assert used.use_after_commit
    assert artifacts["data"].use_after_commit
    assert not artifacts[f"model-{metadata['sha256'][:12]}"].use_after_commit


def test_neither_the_home_directory_nor_a_key_is_recorded(tracked: tuple[RunDirectory, list[Any]]) -> None:
    run, records = tracked
    home = str(Path(run.path).parents[1])
    for found in records:
        for entry in found.artifact.manifest.contents:
            # Where the file waits for its upload: read by `wandb sync`, sent to nobody.
            entry.ClearField("local_path")
        text = str(found)
        assert home not in text
        assert KEY not in text
    sent = [p for p in run.path.glob("wandb/offline-run-*/files/**/*") if p.is_file()]
    assert len(sent) > 3
    for path in [*sent, *(run.path / "wandb" / "artifacts").glob("staging/*"), run.student / "README.md"]:
        assert home not in path.read_text()
        assert KEY not in path.read_text()


def test_weights_go_only_where_asked(
    train: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = train(
        "sft",
        "logger=wandb",
        "logger.wandb.mode=offline",
        "logger.wandb.log_model=true",
        "trainer.max_steps=1",
    )
    models = [a for a in of_kind(read_run(run), "artifact") if a.type == "model"]
    assert "model.safetensors" in {entry.path for entry in models[0].manifest.contents}


def test_redaction_hides_whole_components_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SOME_TOKEN", "tok-12345678")
    given = {"/home/somebody/a": ["/home/somebody", "/home/somebody2/x", "/data/home/somebody/x", 3, None]}
    assert redacted(given) == {"~/a": ["~", "/home/somebody2/x", "/data/home/somebody/x", 3, None]}
    assert redacted("x=/home/somebody/y tok-12345678") == "x=~/y ***"
    assert redacted("https://user:word@host/data") == "https://***@host/data"
    monkeypatch.setenv("HOME", "/")
    assert redacted("/a/b") == "/a/b"


def test_changes_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.git_changes() is None
    git("init")
    (tmp_path / "file.py").write_text("a = 1\n")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "deltakd"\n')
    git("add", "file.py", "pyproject.toml")
    git("commit", "-m", "first")
    assert environment.git_changes() is None
    (tmp_path / "file.py").write_text("a = 2\n")
    (tmp_path / "new.py").write_text("b = 1\n")
    changes = environment.git_changes() or ""
    assert "-a = 1\n+a = 2\n" in changes
    assert changes.endswith("# new file, not in this diff: new.py\n")
    monkeypatch.setattr(environment, "CHANGES_LIMIT", 20)
    cut = environment.git_changes() or ""
    assert "more characters were left out" in cut
    assert len(cut) < 120


@pytest.mark.parametrize(
    ("inner", "name"),
    [("lib/python3.11/site-packages", "deltakd"), ("vendor/deltakd", "deltakd"), (".", "a_users_project")],
)
def test_a_repository_of_the_users_is_not_recorded(
    inner: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / inner
    root.mkdir(parents=True, exist_ok=True)
    (root / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init"], ["add", "."], ["commit", "-m", "first"]):
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)
    (root / "secret.py").write_text("a = 1\n")
    monkeypatch.setattr(environment, "ROOT", root)
    # What git tells its hooks.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert environment.checkout() is None
    assert environment.git_changes() is None
    recorded = environment.environment()
    assert recorded["git_commit"] is None
    assert recorded["packages"]["deltakd"]


def test_this_checkout_is_ours() -> None:
    folder = Path(environment.__file__).parents[2]
    if (folder / ".git").exists():
        assert environment.checkout() == folder
        assert (environment.git_commit() or "").removesuffix("-dirty").isalnum()


def test_a_run_without_a_home_directory_comes_to_its_end(
    train: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(user: int) -> Any:
        raise KeyError(user)

    path = str(Path.home() / "x")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()
    with pytest.raises(ConfigError, match="this process has none"):
        train("sft", "data.train='~/rows.jsonl'", name="other")
    # W&B reads its own settings once a process.
    wandb.teardown()
    run = train("sft", "logger=[csv,wandb]", "logger.wandb.mode=offline", "trainer.max_steps=1")
    assert run.finished
    assert redacted(path) == path
