"""The commands of the README as their users type them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltakd.config.compose import CONF_DIR, compose_config
from deltakd.evaluate import run_evaluation
from deltakd.io.errors import ConfigError
from deltakd.io.files import read_json_lines
from tests.tiny import World, make_rows, make_tokenizer, save_model, write_rows

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(p.stem for p in (CONF_DIR / "experiment").glob("*.yaml"))


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=240
    )


def add_to_hub(cache: Path, kind: str, name: str) -> Path:
    """An empty snapshot of a repository in a local hub cache, as the hub's client lays it out."""
    repository = cache / f"{kind}s--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A hub cache with tiny checkpoints and few rows under the very names that the GPT-2 experiments use."""
    cache = tmp_path / "hub"
    real = ROOT.parent / "shared" / "tokenizers" / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(real) if real.is_dir() else make_tokenizer()
    names = ("openai-community/gpt2", "openai-community/gpt2-xl", "MiniLLM/teacher-gpt2-1.5B")
    for seed, name in enumerate(names):
        save_model(add_to_hub(cache, "model", name), seed=seed, tokenizer=tokenizer, width=8, n_positions=1024)
    dolly = add_to_hub(cache, "dataset", "databricks/databricks-dolly-15k")
    write_rows(
        dolly / "databricks-dolly-15k.jsonl",
        [r | {"instruction": f"{r['instruction']} {i}"} for i, r in enumerate(make_rows(1040, 1))],
    )
    for name, seed in (("MiniLLM/dolly", 2), ("MiniLLM/self-inst", 3), ("MiniLLM/Vicuna", 4)):
        rows = [
            {"instruction": r["instruction"], "input": r["context"], "output": r["response"]}
            for r in make_rows(3, seed)
        ]
        write_rows(add_to_hub(cache, "dataset", name) / "valid.jsonl", rows)
    return cache


LIMITS = (
    "trainer.max_steps=2",
    "data.batch_size=2",
    "evaluation.seeds=[10]",
    "evaluation.val_limit=2",
    "evaluation.decoding.max_new_tokens=4",
)


@pytest.mark.slow
def test_delta_kd_gpt2_from_a_hub_cache(hub: Path, tmp_path: Path) -> None:
    done = run(
        "deltakd.train", "experiment=delta_kd_gpt2", *LIMITS, f"run_dir={tmp_path / 'run'}",
        cwd=tmp_path, HF_HUB_CACHE=str(hub), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "val/rougeL = " in done.stdout
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["teacher"]["path"] == "MiniLLM/teacher-gpt2-1.5B"
    assert config["optim"]["lr"] == 5e-4
    assert config["optim"]["schedule"] == "cosine"
    assert config["trainer"]["max_epochs"] == 20
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"dolly/rougeL", "self_inst/rougeL", "vicuna/rougeL"} <= summary.keys()
    assert set(summary["meta"]["parameters"]) == {"student", "teacher", "teacher_raw", "student_raw"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")), "W&B's offline record is absent"


@pytest.mark.slow
def test_without_a_hub_one_line_says_what_to_do(tmp_path: Path) -> None:
    done = run(
        "deltakd.train", "experiment=delta_kd_gpt2",
        cwd=tmp_path, HF_HUB_CACHE=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "MiniLLM/teacher-gpt2-1.5B" in line
    assert "can't be reached" in line
    assert "model.<role>.path=/path/to/model_directory" in line


@pytest.mark.slow
def test_train_then_evaluate(world: World, tmp_path: Path) -> None:
    done = run("deltakd.train", *world.overrides(tmp_path / "run", "delta_kd", "delta_weight=0"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "val/loss = " in done.stdout
    mine = tmp_path / "mine.jsonl"
    shutil.copy(world.root / "test.jsonl", mine)
    done = run(
        "deltakd.evaluate", f"run={tmp_path / 'run'}", f"evaluation.sets={{mine: {mine}}}", "evaluation.limit=5",
        "evaluation.seeds=[10,20]", f"run_dir={tmp_path / 'evaluated'}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    assert {"mine/rougeL", "mine/rougeL_stderr", "mine/exact_match"} <= summary.keys()
    assert len((tmp_path / "evaluated" / "generations" / "mine_seed20.jsonl").read_text().splitlines()) == 5
    again = [f"run={tmp_path / 'run'}", f"evaluation.sets={{mine: {mine}}}", f"run_dir={tmp_path / 'evaluated_2'}"]
    greedy = run_evaluation([*again, "evaluation.decoding.do_sample=false", "evaluation.seeds=[1,2]"])
    answers = [read_json_lines(tmp_path / "evaluated_2" / "generations" / f"mine_seed{k}.jsonl") for k in (1, 2)]
    assert answers[0] is not None
    assert answers[1] is not None
    assert [a["output"] for a in answers[0]] == [a["output"] for a in answers[1]]
    assert answers[1][0]["decoding"]["seed"] == 2
    # Another student in the same place: its answers are not those of the one before.
    shutil.rmtree(tmp_path / "run" / "student")
    shutil.copytree(world.root / "teacher", tmp_path / "run" / "student")
    with pytest.raises(ConfigError, match="another config: evaluated_model_sha256"):
        run_evaluation([*again, "evaluation.decoding.do_sample=false", "evaluation.seeds=[1,2]"])
    assert greedy["mine/rougeL_stderr"] >= 0


@pytest.mark.slow
def test_multirun_leaves_a_directory_a_job(world: World, tmp_path: Path) -> None:
    arguments = [a for a in world.overrides(tmp_path / "unused", "sft") if not a.startswith(("loss=", "run_dir="))]
    done = run("deltakd.train", "--multirun", *arguments, "loss=sft,kd", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("outputs/multirun/*/[01]/summary.json"))) == 2


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_opens_with_its_command(name: str) -> None:
    lines = (CONF_DIR / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python -m deltakd.train experiment={name}")
    assert compose_config("train", [f"experiment={name}"]).loss


@pytest.mark.slow
def test_identity_16_two_processes_are_one(world: World, tmp_path: Path) -> None:
    """One process with 8 rows, two with 4: the same losses and the same student (no dropout)."""
    student = save_model(tmp_path / "no_dropout", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    common = [f"model.student.path={student}", "optim.lr=0.001", "optim.eps=1e-4", "trainer.val_every_n_steps=2"]
    for name, *extra in (
        ("one", "data.batch_size=8"),
        ("two", "data.batch_size=4", "trainer.devices=2", "strategy=ddp", "trainer.accelerator=cpu"),
    ):
        done = run("deltakd.train", *world.overrides(tmp_path / name, "delta_kd", *common, *extra), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)
    tables = [losses(tmp_path / name / "metrics.csv") for name in ("one", "two")]
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-5, atol=0)


def losses(path: Path) -> list[float]:
    with path.open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
