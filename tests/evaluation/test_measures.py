"""Measures beyond ROUGE of whole runs, against sums by hand over all logits of all four models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltakd.cache import make_cache
from deltakd.evaluate import run_evaluation
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models import LanguageModel
from tests.tiny import World, save_model, write_rows

Train = Callable[..., RunDirectory]
ON = "evaluation.measures.rows=null"
MEASURES = ("perplexity", "ece", "kl_teacher", "kl_raw_student", "top1_agreement", "shift_correlation")


def by_hand(run: RunDirectory, world: World, file: str, rows: int | None = None) -> dict[str, float]:
    """The measures from whole logits in NumPy float64, row by row, tokens encoded anew."""
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    paths = {"student": run.student} | {role: world.root / role for role in ("teacher", "teacher_raw", "student_raw")}
    models = {role: AutoModelForCausalLM.from_pretrained(path).eval() for role, path in paths.items()}
    nll, kl, moved, agree, correlations, top, right = [], [], [], [], [], [], []
    for line in (world.root / file).read_text().splitlines()[:rows]:
        row = json.loads(line)
        prompt = tokenizer(f"{row['instruction']}: {row['context']}>")["input_ids"]
        answer = [*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            z = {role: model(input_ids=ids).logits[0].double().numpy() for role, model in models.items()}
        for at, label in enumerate(answer, len(prompt) - 1):
            log_p = {role: of[at] - np.log(np.exp(of[at]).sum()) for role, of in z.items()}
            p = np.exp(log_p["teacher"])
            nll.append(-log_p["student"][label])
            kl.append(np.sum(p * (log_p["teacher"] - log_p["student"])))
            raw = log_p["student_raw"]
            moved.append(np.sum(np.exp(raw) * (raw - log_p["student"])))
            agree.append(np.argmax(p) == np.argmax(log_p["student"]))
            x, y = log_p["student"] - log_p["student_raw"], log_p["teacher"] - log_p["teacher_raw"]
            cov = np.cov(np.stack([x, y]), aweights=p, ddof=0)
            correlations.append(cov[0, 1] / math.sqrt(cov[0, 0] * cov[1, 1]))
            top.append(np.exp(log_p["student"].max()))
            right.append(np.argmax(log_p["student"]) == label)
    ece = 0.0
    for m in range(15):
        inside = [i for i, c in enumerate(top) if m / 15 < c <= (m + 1) / 15]
        if inside:
            ece += len(inside) / len(top) * abs(np.mean([right[i] for i in inside]) - np.mean([top[i] for i in inside]))
    values = (
        math.exp(np.mean(nll)),
        100 * ece,
        np.mean(kl),
        np.mean(moved),
        100 * np.mean(agree),
        np.mean(correlations),
    )
    return dict(zip(MEASURES, map(float, values), strict=True)) | {"tokens": len(nll)}


def figures(run: RunDirectory, name: str) -> dict[str, float]:
    summary = run.read_summary()
    found = {measure: summary[f"{name}/{measure}"] for measure in MEASURES if f"{name}/{measure}" in summary}
    return found | {"tokens": summary["meta"]["measured"][name]["tokens"]}


@pytest.mark.parametrize("loss", ["sft", pytest.param("kd", marks=pytest.mark.slow), "delta_kd"])
def test_every_method_is_measured_alike(train: Train, world: World, loss: str) -> None:
    """Whatever its loss reads; on validation rows alone where nothing is generated, so that test sets stay unseen."""
    run = train(loss, ON, f"evaluation.sets={{mine: {world.root / 'test.jsonl'}}}")
    assert figures(run, "val") == pytest.approx(by_hand(run, world, "val.jsonl"), rel=1e-4)
    summary = run.read_summary()
    assert summary["val/perplexity"] == pytest.approx(math.exp(summary.get("val/ce", summary["val/loss"])), rel=1e-4)
    assert summary["meta"]["measured"]["val"]["references"] == "live"
    assert not [key for key in summary if key.startswith("mine/")]


@pytest.mark.slow
def test_evaluation_sets_of_a_training_and_of_evaluate(train: Train, world: World, tmp_path: Path) -> None:
    sets = f"evaluation.sets={{mine: {world.root / 'test.jsonl'}}}"
    run = train("kd", "evaluation.measures.rows=4", "evaluation=default", "evaluation.val_limit=2", sets)
    for name, file in (("mine", "test.jsonl"), ("val", "val.jsonl")):
        assert figures(run, name) == pytest.approx(by_hand(run, world, file, rows=4), rel=1e-4)
        assert run.read_summary()["meta"]["measured"][name]["rows"] == 4
    for measure in ("distinct_1", "distinct_2", "distinct_4", "length_ratio", "repetition_4"):
        assert run.read_summary()[f"mine/{measure}"] >= 0
    again = run_evaluation([f"run={run.path}", f"run_dir={tmp_path / 'again'}", "evaluation.batch_size=2"])
    measured = {key: value for key, value in run.read_summary().items() if key.split("/")[-1] in MEASURES}
    assert {key: again[key] for key in measured} == pytest.approx(measured, rel=1e-6)
    # Another model, and no word of teachers: its own figures alone.
    raw = run_evaluation(
        [f"model={world.root / 'student_raw'}", sets, "data.template={with_input: '{instruction}: {input}>', "
         "without_input: '{instruction}>', tail: '>'}", f"run_dir={tmp_path / 'raw'}",
         "evaluation.decoding.max_new_tokens=4", "data.max_length=120", "data.max_prompt_length=90"]
    )  # fmt: skip
    assert raw["mine/perplexity"] > measured["mine/perplexity"]
    assert "mine/kl_teacher" not in raw
    assert "val/perplexity" not in raw


def test_cached_references_give_the_figures_of_live_ones(
    train: Train, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = ("reference=cached", f"reference.path={tmp_path / 'hidden'}")
    make_cache(world.overrides(tmp_path / "unused", "delta_kd", *cached))
    live = figures(train("sft", ON, name="live"), "val")
    assert set(live) == {*MEASURES, "tokens"}

    def loads(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("deltakd.evaluation.measured_references.open_reference", loads)
    run = train("sft", ON, *cached, name="cached")
    assert figures(run, "val") == pytest.approx(live, rel=1e-5)
    assert run.read_summary()["meta"]["measured"]["val"]["references"] == "cached"


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "store", "came"), [("sft", "topk", "live"), ("kd", "hidden", "cached and live")])
def test_what_a_cache_lacks_is_loaded(
    train: Train, world: World, tmp_path: Path, loss: str, store: str, came: str
) -> None:
    """A store of some tokens gives no exact measure, and one of the teacher alone lacks the raw models."""
    cached = ("reference=cached", f"reference.path={tmp_path / 'cache'}", f"reference.store={store}")
    make_cache(world.overrides(tmp_path / "unused", "kd", *cached))
    run = train(loss, ON, *cached)
    assert run.read_summary()["meta"]["measured"]["val"]["references"] == came
    assert figures(run, "val") == pytest.approx(figures(train(loss, ON, name="live"), "val"), rel=0.05)


@pytest.mark.slow
def test_what_can_not_be_had_is_left_out_and_said(
    train: Train, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    short = save_model(tmp_path / "short", seed=5, n_positions=8)
    models = ("model.teacher.path=/no/such/model", f"model.teacher_raw.path={short}")
    run = train("sft", ON, *models, name="none")
    assert set(figures(run, "val")) == {"perplexity", "ece", "kl_raw_student", "tokens"}
    assert (
        "The teacher is not available, so its measures are left out: model.teacher.path=/no/such/model" in caplog.text
    )
    assert "The teacher_raw has positions for 8 tokens" in caplog.text
    assert "val is measured without teacher, teacher_raw." in caplog.text
    alone = train("kd", ON, "evaluation.measures.references=none", name="alone")
    assert set(figures(alone, "val")) == {"perplexity", "ece", "tokens"}
    long = write_rows(tmp_path / "long.jsonl", [{"instruction": "a " * 200, "response": "b"}])
    sets = ("evaluation=default", "data.overlong=drop", f"evaluation.sets={{long: {long}}}")
    train("sft", ON, *sets, name="long")
    assert "long is not measured beyond its answers: all 1 rows are longer than the limits" in caplog.text
    with pytest.raises(
        ConfigError, match=r"(?s)measures.rows is -1; it must be a whole .*references is 'all'; it must be auto"
    ):
        train("sft", "evaluation.measures.rows=-1", "evaluation.measures.references=all", name="bad")


def test_a_reference_that_does_not_fit_costs_no_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there = torch.nn.Module.to

    def to(model: torch.nn.Module, *arguments: object, **options: object) -> torch.nn.Module:
        # The device is the CPU here, and the first that comes is the teacher.
        if isinstance(model, LanguageModel) and arguments == (torch.device("cpu"),) and not refused:
            refused.append(model)
            raise torch.OutOfMemoryError("out of memory")
        return there(model, *arguments, **options)

    refused: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "to", to)
    run = train("sft", ON)
    assert set(figures(run, "val")) == {"perplexity", "ece", "kl_raw_student", "tokens"}
    assert "The teacher does not fit beside the student" in caplog.text
    assert run.read_summary()["meta"]["measured"]["val"]["references"] == "live"


def test_a_student_that_did_not_move_has_no_correlation(train: Train, world: World) -> None:
    run = train("sft", ON, "optim.lr=1e-12", "trainer.max_steps=1")
    measured = run.read_summary()["meta"]["measured"]["val"]
    assert measured["tokens_without_shift"] == measured["tokens"]
    assert set(figures(run, "val")) == {*MEASURES, "tokens"} - {"shift_correlation"}
