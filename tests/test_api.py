"""Distillation from Python: distill, prepare, and the examples of the documentation."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltakd
from deltakd import distill, prepare
from deltakd.config.given_objects import Given, as_source
from deltakd.io.errors import ConfigError
from deltakd.models import LanguageModel
from deltakd.training.module import DistillationModule
from tests.tiny import World, make_rows

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = {"with_input": "{instruction}: {input}>", "without_input": "{instruction}>", "tail": ">"}
QUICK: dict[str, Any] = {
    "logger": "csv",
    "evaluation": "none",
    "evaluation.measures.rows": 0,
    "evaluation.allow_overlap": True,
    "trainer.log_every_n_steps": 1,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def models(world: World) -> dict[str, Any]:
    return {
        "student": world.root / "student_raw",
        "teacher": world.root / "teacher",
        "teacher_raw": world.root / "teacher_raw",
    }


def small(world: World, **changes: Any) -> dict[str, Any]:
    given = {
        "data": world.root / "train.jsonl", "template": TEMPLATE, "max_length": 120, "max_prompt_length": 90,
        "batch_size": 4, "lr": 0.01, "max_steps": 3, "overrides": QUICK,
    }  # fmt: skip
    return models(world) | given | changes


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = (
        "import sys, deltakd; dir(deltakd); print(*[m for m in ('torch', 'hydra', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")
    with pytest.raises(AttributeError, match="module 'deltakd' has no attribute 'distil'"):
        deltakd.distil  # noqa: B018


def test_a_run_from_python_is_the_run_of_the_command_line(world: World, folder: Path, capsys: Any) -> None:
    levels = [logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")]
    handler = signal.getsignal(signal.SIGINT)
    run = distill(**small(world, name="mine"))
    assert run.directory.parent == Path("outputs/mine")
    assert run.objective == "train/loss"
    assert run.scores["train/loss"] > 0
    assert repr(run).startswith(f"<deltakd run {run.directory}: train/loss = ")
    assert run.tokenizer.decode(run.tokenizer("red cat")["input_ids"]) == "red cat"
    start = AutoModelForCausalLM.from_pretrained(world.root / "student_raw")
    changed = [not torch.equal(a, b) for a, b in zip(run.student.parameters(), start.parameters(), strict=True)]
    assert all(changed)
    assert not run.student.training
    # What it changed in the process is put back, and a second run has a directory of its own.
    assert [logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")] == levels
    assert signal.getsignal(signal.SIGINT) == handler
    again = distill(**small(world, name="mine", progress=False))
    assert again.directory != run.directory
    assert again.scores["train/loss"] == run.scores["train/loss"]


@pytest.mark.slow
def test_a_default_run_never_imports_deepspeed(world: World, folder: Path) -> None:
    code = (
        "import json, sys, deltakd; given = json.loads(sys.argv[1]);"
        "deltakd.distill(**given, progress=False);"
        "print([name for name in sys.modules if name.partition('.')[0] == 'deepspeed'])"
    )
    given = json.dumps(small(world, max_steps=1, loss="sft"), default=str)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, given], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
    assert "Warning" not in done.stderr
    assert "accelerator" not in done.stderr


def test_a_finished_run_is_only_read(world: World, folder: Path) -> None:
    first = distill(**small(world, run_dir="here", loss="sft"))
    with pytest.raises(ConfigError, match="run_dir=here already holds a run"):
        distill(**small(world, run_dir="here", loss="sft"))
    assert distill(**small(world, run_dir="here", loss="sft", resume=True)).summary == first.summary


def test_a_run_leaves_no_models_in_memory(world: World, folder: Path) -> None:
    def living() -> int:
        return sum(isinstance(thing, (DistillationModule, LanguageModel)) for thing in gc.get_objects())

    gc.collect()
    gc.disable()  # Python's own search for cycles must not come first by chance
    try:
        before = living()
        distill(**small(world, loss="sft", progress=False))
        assert living() == before
    finally:
        gc.enable()


def test_rows_and_models_may_be_objects(world: World, folder: Path) -> None:
    rows = make_rows(12, 1)
    student = AutoModelForCausalLM.from_pretrained(world.root / "student_raw")
    tokenizer = AutoTokenizer.from_pretrained(world.root / "student_raw")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    given = small(world, student=student, tokenizer=tokenizer, data=Dataset.from_list(rows), loss="kd")
    run = distill(**given)
    assert run.summary["meta"]["data"]["train/rows"] == 12
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    (copied,) = Path("outputs/cache/models").iterdir()
    assert AutoTokenizer.from_pretrained(copied).vocab_size == tokenizer.vocab_size
    # Resumed, the same objects are the same files.
    config = (run.directory / "config.yaml").read_text()
    assert str(copied.absolute()) in config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "data is empty; give a file, a list of files, rows as a list of dicts"),
        ([{"a": 1}, 5], "data is a list with 5 at 1; give"),
        (7, "data is a int; give"),
        (DatasetDict(train=Dataset.from_list([{"a": 1}])), "data is a mapping with train; give one of its values"),
        ([{"a": {1, 2}}], "data: a row can't be written as JSON: Object of type set is not JSON serializable"),
    ],
)
def test_what_are_no_rows_is_told(value: Any, message: str, tmp_path: Path) -> None:
    problems: list[str] = []
    assert as_source("data", value, Given(tmp_path), problems) is None
    (problem,) = problems
    assert problem.startswith(message)


def test_rows_are_kept_under_the_name_of_their_content(tmp_path: Path) -> None:
    sources = [as_source("data", rows, Given(tmp_path), []) for rows in ([{"a": "é"}], [{"a": "é"}], [{"a": 1}])]
    assert sources[0] == sources[1] != sources[2]
    assert json.loads(Path(sources[0]).read_text(encoding="utf-8")) == {"a": "é"}
    assert as_source("data", [Path("a.jsonl"), "b.jsonl"], Given(tmp_path), []) == ["a.jsonl", "b.jsonl"]


def test_all_problems_come_at_once_as_an_exception(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        distill("gpt2", overrides={"optim.lrr": 1, "trainer.max_step": 2}, student_raw=5)
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "student_raw is a int",
        "there is no config key 'optim.lrr'",
        "there is no config key 'trainer.max_step'",
    ]
    with pytest.raises(ConfigError, match="no argument 'learning_rate'; give it by overrides, or one of name, student"):
        distill("gpt2", learning_rate=1)
    with pytest.raises(ConfigError) as caught:
        distill(lr=-1, max_steps=2.5, overrides=["optim.weight_decay=-1"])
    assert {problem.split(" ")[0] for problem in caught.value.problems} >= {
        "optim.lr", "trainer.max_steps", "optim.weight_decay", "model.student.path", "data.train",
    }  # fmt: skip


def test_an_experiment_of_ones_own_and_overrides_of_either_kind(world: World, folder: Path) -> None:
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/own.yaml").write_text("# @package _global_\noptim: {eps: 0.5}\nseed: 7\n")
    given = small(world, experiment="own", overrides=["evaluation=none", "logger=csv", "optim.betas=[0.5,0.6]"])
    settings = prepare(**given, loss="kd_jsd").settings
    assert (settings.optim.eps, settings.seed, settings.optim.betas, settings.optim.lr) == (0.5, 7, [0.5, 0.6], 0.01)
    settings = prepare(**small(world, overrides=QUICK | {"loss/divergence": "todi", "loss.temperature": 2.0})).settings
    assert (settings.loss_name, settings.loss.temperature) == ("delta_kd + todi", 2.0)


def test_a_run_in_another_thread_needs_no_signals(world: World, folder: Path) -> None:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(distill(**small(world, progress=False, loss="sft")).scores["train/loss"])
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], float), found


@pytest.mark.slow
def test_an_interrupted_run_is_resumed_by_the_same_call(world: World, folder: Path, monkeypatch: Any) -> None:
    from deltakd.training.callbacks.training_log import TrainingLog

    after = TrainingLog.on_train_batch_end

    def interrupt(self: TrainingLog, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        after(self, trainer, *args, **kwargs)
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    whole = distill(**small(world, progress=False, max_steps=5))
    monkeypatch.setattr(TrainingLog, "on_train_batch_end", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped by SIGINT after 2 .* To go on: the same call with resume=True"
    ):
        distill(**small(world, progress=False, max_steps=5, run_dir="stopped"))
    assert signal.getsignal(signal.SIGINT) == handler
    monkeypatch.setattr(TrainingLog, "on_train_batch_end", after)
    run = distill(**small(world, progress=False, max_steps=5, run_dir="stopped", resume=True))
    assert run.scores == whole.scores


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_of_distill_runs(world: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = models(world) | {"data": make_rows(12, 1), "template": TEMPLATE, "batch_size": 4}
    example("distill").main(**given, max_length=120, max_prompt_length=90)
    (value, directory), *_ = [line.split() for line in capsys.readouterr().out.splitlines() if "outputs/run" in line]
    assert float(value) > 0
    assert (folder / directory / "student" / "config.json").is_file()


def test_the_example_of_a_trainer_of_ones_own_trains(world: World, folder: Path) -> None:
    given = small(world)
    for name in ("lr", "max_steps"):
        del given[name]
    losses = example("own_trainer").main("mine", **given)
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert AutoModelForCausalLM.from_pretrained("mine/student").num_parameters() > 0
    assert list(Path("mine").rglob("metrics.csv"))


def test_the_example_of_a_loop_of_ones_own_trains(world: World) -> None:
    paths = {role: str(path) for role, path in models(world).items()}
    losses = example("own_loop").main(**paths, texts=["red cat sun", "blue dog moon star"])
    assert losses[-2:] < losses[:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"accumulate_grad_batches": 2},
            "accumulate_grad_batches is 2, but .* is 1; give the trainer run.trainer_options",
        ),
        ({"max_epochs": 3}, "max_epochs is 3; .*hands out the whole run as one epoch"),
    ],
)
def test_a_trainer_that_does_not_fit_the_data_is_refused(
    change: dict[str, Any], message: str, world: World, folder: Path
) -> None:
    run = prepare(**small(world, loss="sft"))
    options = run.trainer_options | change
    trainer = L.Trainer(**options, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    with pytest.raises(ValueError, match=message):
        trainer.fit(run.module, datamodule=run.data)
