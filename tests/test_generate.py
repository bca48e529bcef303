"""``deltakd.generate``: the teacher's answers as training data, and SFT on them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltakd.config.build import make_settings
from deltakd.config.compose import CONF_DIR, compose_config
from deltakd.data import InstructionData, Row, encode_prompt, encode_row, make_template, read_rows
from deltakd.evaluation import teacher_answers
from deltakd.generate import main, next_command, run_generation
from deltakd.io.errors import ConfigError
from deltakd.io.files import read_json_lines
from deltakd.io.run_directory import RunDirectory
from deltakd.models import load_tokenizer, train_tokenizer
from deltakd.models.identity import hub_snapshot
from deltakd.training.run import run_training
from tests.tiny import World, make_rows, save_model, write_rows


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [turn("system", "be red"), turn("user", "cat?"), turn("assistant", "dog"), turn("user", "sun?")]


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A teacher that some answers of a random model end for, and rows in every form."""
    root = tmp_path_factory.mktemp("talkative")
    save_model(root / "student_raw", seed=1)
    config = save_model(root / "teacher", seed=3, width=24) / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [*range(1, 300, 9)]}))
    rows: list[dict[str, Any]] = [
        r | {"instruction": f"{r['instruction']} {i}"} for i, r in enumerate(make_rows(40, 1))
    ]
    rows[3:3] = [
        {"prompt": "verbatim: moon", "output": ["star", "sun"]},
        {"messages": [*TALK, turn("assistant", "moon"), turn("user", "left out")], "category": "talk"},
        {"instruction": "a prompt that is cut " * 12, "output": "red"},
        {"instruction": "tested", "output": "red"},
    ]
    write_rows(root / "train.jsonl", rows)
    write_rows(root / "test.jsonl", [{"instruction": "Tested", "output": "red"}])
    (root / "split.json").write_text(json.dumps({"train": [*range(42)]}))
    return World(root)


def overrides(world: World, run_dir: Path, *extra: str) -> list[str]:
    chosen = (
        "data.val=null",
        "data.val_size=5",
        f"data.exclude=[{world.root / 'test.jsonl'}]",
        f"data.train_subset='{world.root / 'split.json'}#train'",
        "evaluation.decoding.max_new_tokens=12",
        "evaluation.seeds=[1,8]",
        *extra,
    )
    return [o for o in world.overrides(run_dir, "kd", *chosen) if not o.startswith("model.teacher_raw")]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def answered(talkative: World, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The whole command, uninterrupted."""
    run_dir = tmp_path_factory.mktemp("answered") / "run"
    main(overrides(talkative, run_dir))
    return RunDirectory(run_dir)


def prompt_of(row: Row, data: InstructionData, tokenizer: Any) -> list[int]:
    return encode_prompt(row, make_template(data.template, tokenizer), tokenizer, data.max_prompt_length)


def test_prompts_are_those_of_the_training_set_and_answers_the_teachers(
    talkative: World, answered: RunDirectory
) -> None:
    plan = make_settings(compose_config("train", overrides(talkative, answered.path)))
    tokenizer = load_tokenizer(str(talkative.root / "student_raw"), "model")
    sets = plan.data.load(tokenizer)
    original = {row.id: row for row in read_rows(str(talkative.root / "train.jsonl"))}
    records = [r for part in sorted((answered.path / "answers").iterdir()) for r in read_json_lines(part) or []]
    # Exactly the rows of the training: the excluded, the held-out and those outside of the subset are not asked.
    assert [r["row_id"] for r in records] == list(dict.fromkeys(sets.train.row_ids.tolist()))
    assert len(records) == 42 - 1 - 5
    kept = [r for r in records if r["finished"] and r["output"].strip()]
    rows = read_rows(str(answered.path / "train.jsonl"))
    assert [line["row_id"] for line in lines(answered.path / "train.jsonl")] == [r["row_id"] for r in kept]
    assert {3, 4, 5} <= {r["row_id"] for r in kept}, "the teacher's seed leaves a form of row untested"
    for row, record in zip(rows, kept, strict=True):
        before = original[record["row_id"]]
        ids = prompt_of(before, plan.data, tokenizer)
        assert len(ids) == record["prompt_tokens"]
        assert prompt_of(row, plan.data, tokenizer) == ids
        trained = encode_row(row, make_template(plan.data.template, tokenizer), tokenizer, 120, 90)
        assert trained is not None
        answer = tokenizer(record["output"])["input_ids"]
        assert trained.input_ids == ids + answer + [tokenizer.eos_token_id]
        assert row.references == (record["output"],)
        assert row.category == before.category
    (talk,) = (row for row in rows if row.messages)
    assert [dict(m) for m in talk.messages or ()][:-1] == TALK
    held_out = [(row.question, row.references) for row in sets.val_rows]
    assert [(r.question, r.references) for r in read_rows(str(answered.path / "val.jsonl"))] == held_out


def test_unfinished_and_empty_answers_are_left_out_and_counted(answered: RunDirectory) -> None:
    summary = answered.read_summary()
    records = read_json_lines(answered.path / "answers" / "part_00000.jsonl") or []
    for record in records:
        assert record["finished"] == (record["output_tokens"] < 12)
    unfinished = [r for r in records if not r["finished"]]
    empty = [r for r in records if r["finished"] and not r["output"].strip()]
    kept = [r for r in records if r["finished"] and r["output"].strip()]
    assert min(len(unfinished), len(empty)) > 0
    assert [summary[k] for k in ("prompts", "answered", "empty", "unfinished", "held_out")] == [
        len(records), len(kept), len(empty), len(unfinished), 5,
    ]  # fmt: skip
    assert summary["answer_tokens"] == pytest.approx(sum(r["output_tokens"] for r in kept) / len(kept), abs=1e-3)
    meta = summary["meta"]
    assert meta["seed"] == 1
    assert meta["decoding"]["max_new_tokens"] == 12
    assert len(meta["teacher_sha256"]) == len(meta["tokenizer_sha256"]) == 64
    assert meta["parameters"].keys() == {"teacher"}
    for key in ("git_commit", "device", "seconds", "tokens_per_second", "peak_memory_mib", "teacher", "tokenizer"):
        assert meta[key], key


def test_an_interrupted_one_goes_on_and_ends_byte_for_byte_the_same(
    talkative: World, answered: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = overrides(talkative, tmp_path / "run", "evaluation.batch_size=3")
    asked: list[int] = []
    answer_set: Callable[..., Any] = teacher_answers.answer_set

    def until(stop: int) -> None:
        def limited(*given: Any, **options: Any) -> Any:
            if len(asked) == stop:
                raise KeyboardInterrupt
            asked.append(len(given[2]))
            return answer_set(*given, **options)

        monkeypatch.setattr(teacher_answers, "answer_set", limited)

    monkeypatch.setattr(teacher_answers, "SHARD_PROMPTS", 10)
    until(2)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 130
    assert asked == [10, 10]
    assert not (tmp_path / "run" / "train.jsonl").exists()
    with pytest.raises(ConfigError, match=r"another config: evaluation.decoding.top_k \(0 there, 5 now\)"):
        run_generation([*arguments, "evaluation.decoding.top_k=5"])
    until(99)
    summary = run_generation(arguments)
    assert asked == [10, 10, 10, 6]
    for name in ("train.jsonl", "val.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (answered.path / name).read_bytes()
    # A finished one is only read.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    assert run_generation(arguments) == summary
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_sft_on_the_answers_by_the_command_that_was_logged(
    talkative: World, answered: RunDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = overrides(talkative, answered.path)
    with caplog.at_level("INFO", "deltakd.generate"):
        run_generation(arguments)
    command = next_command(arguments, answered.path, held_out=True)
    assert shlex.split(caplog.messages[-1].partition(": ")[2]) == command
    assert command[:3] == ["python", "-m", "deltakd.train"]
    run_training(make_settings(compose_config("train", [*command[3:], "trainer.max_steps=2"])), tmp_path / "sft")
    config = yaml.safe_load((tmp_path / "sft" / "config.yaml").read_text())
    assert config["loss"]["_target_"].endswith("SupervisedFineTuning")
    assert config["evaluation"]["decoding"]["max_new_tokens"] == 256
    data = RunDirectory(tmp_path / "sft").read_summary()["meta"]["data"]
    assert data["train_rows"] == answered.read_summary()["answered"]
    assert (data["val_rows"], data["excluded"]) == (5, 0)


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(talkative: World, answered: RunDirectory, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "deltakd.generate", *overrides(talkative, tmp_path / "run")],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "did not end within evaluation.decoding.max_new_tokens=12" in done.stderr
    assert f"python -m deltakd.train model.student.path={talkative.root}" in done.stderr
    assert (tmp_path / "run" / "train.jsonl").read_bytes() == (answered.path / "train.jsonl").read_bytes()


def test_all_mistakes_are_reported_at_once_before_anything_is_loaded(talkative: World, tmp_path: Path) -> None:
    arguments = [
        *overrides(
            talkative,
            tmp_path / "run",
            "model.teacher.path=null",
            "evaluation.decoding.temperature=0",
            "evaluation.seeds=[]",
            "model.routes={a: 1}",
        ),
    ]
    own = ("data.val_size", "data.exclude", "data.train_subset", "data.template")
    text = [o for o in arguments if not o.startswith(own)]
    with pytest.raises(ConfigError) as caught:
        run_generation(["data=text", *text])
    for problem in (
        "model.teacher.path is missing",
        "evaluation.decoding.temperature is 0",
        "evaluation.seeds is []; it must be a list (each a whole number from 0",
        "data is plain text, which has no prompts to answer",
        "model.routes has a teacher for each task, and deltakd.generate one for all prompts",
    ):
        assert any(problem in p for p in caught.value.problems), problem
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        ConfigError, match=r"no config key 'evaluation.decoding.do_samples'; the nearest one is .*do_sa"
    ):
        run_generation([*arguments, "evaluation.decoding.do_samples=false"])


def test_a_teacher_that_never_ends_is_an_error(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of the teacher's 3 answers 3 did not end and 0 are empty.*max_new_tokens"):
        run_generation(
            [*world.overrides(tmp_path / "run", "kd", "data.limit=4"), "evaluation.decoding.do_sample=false"]
        )
    assert not RunDirectory(tmp_path / "run").finished


def test_a_teacher_with_another_tokenizer_answers_in_its_own(
    talkative: World, answered: RunDirectory, tmp_path: Path
) -> None:
    other = train_tokenizer(["quite another text, with quite other pairs of letters"] * 3, 280)
    teacher = save_model(tmp_path / "teacher", seed=3, width=24, tokenizer=other)
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(1, 270, 9)]}))
    template = "{with_input:'Q{instruction} {input}',without_input:'Q{instruction}',tail:''}"
    options = (f"model.teacher.path={teacher}", f"data.teacher_template={template}", "data.limit=12")
    arguments = overrides(talkative, tmp_path / "run", *options)
    run_generation(arguments)
    records = [r for part in (tmp_path / "run" / "answers").iterdir() for r in read_json_lines(part) or []]
    assert all(r["prompt"].startswith("Q") for r in records if "verbatim" not in r["prompt"])
    assert records[0]["prompt_tokens"] == len(other(records[0]["prompt"])["input_ids"])
    shutil.copytree(answered.path, tmp_path / "answered")
    with pytest.raises(ConfigError, match="another config: answering_teacher"):
        run_generation([*arguments, f"run_dir={tmp_path / 'answered'}"])


def test_rows_that_training_would_drop_are_not_asked(talkative: World) -> None:
    tokenizer = load_tokenizer(str(talkative.root / "student_raw"), "model")
    cfg = compose_config("train", overrides(talkative, Path("unused"), "data.overlong=drop"))
    data = make_settings(cfg).data
    assert isinstance(data, InstructionData)
    asked = [row.id for row in data.read(tokenizer).train]
    assert 5 not in asked
    assert asked == list(dict.fromkeys(data.load(tokenizer).train.row_ids.tolist()))


def test_the_version_of_a_hub_model_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    snapshot = save_model(repository / "snapshots" / ("a" * 40), seed=0, width=8)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert hub_snapshot("owner/name") == snapshot
    assert hub_snapshot("owner/other") is None


def test_the_experiment_reads_what_its_second_command_writes() -> None:
    head = (CONF_DIR / "experiment" / "seqkd_gpt2.yaml").read_text()
    (command,) = (line[2:].split() for line in head.splitlines() if line.startswith("# python -m deltakd.generate"))
    asked = compose_config("train", command[3:])
    trained = compose_config("train", ["experiment=seqkd_gpt2"])
    assert trained.data.train == f"{asked.run_dir}/{teacher_answers.TRAIN_FILE}"
    assert trained.data.val == f"{asked.run_dir}/{teacher_answers.VAL_FILE}"
    assert asked.data.val_size > 0
    assert trained.loss._target_.endswith("SupervisedFineTuning")
    assert trained.model.student.path == asked.model.student.path
