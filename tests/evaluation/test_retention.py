"""What a student keeps of what it knew, against models run by hand and against what greedy decoding writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.evaluation.retention import recalled
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.training.run import run_training
from tests.tiny import WORDS, World, write_rows

Train = Callable[..., RunDirectory]
KEY = "evaluation.measures.retained"
NAMES = ("perplexity", "perplexity_before", "kl_raw_student", "fact_recall", "fact_recall_before")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "raw.txt"
    path.write_text("\n<|endoftext|>\n".join(f"{a} {b} {a}" for a in WORDS for b in WORDS[:4]) + "\n")
    return path


@pytest.fixture
def facts(tmp_path: Path, world: World) -> Path:
    """Half of them what the raw student would write by itself, of several tokens each."""
    model, tokenizer = opened(world.root / "student_raw")
    rows = []
    for number, word in enumerate(WORDS):
        prompt = f"Repeat {word}"
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        own = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        completion = tokenizer.decode(own[0, ids.shape[1] :]) if number % 2 else " bird moon"
        rows.append({"prompt": prompt, "completion": completion or " sun"})
    return write_rows(tmp_path / "facts.jsonl", rows)


def opened(path: Path) -> tuple[torch.nn.Module, object]:
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def text_by_hand(run: RunDirectory, world: World, text: Path, length: int) -> dict[str, float]:
    student, tokenizer = opened(run.student)
    raw, _ = opened(world.root / "student_raw")
    documents = text.read_text().removesuffix("\n").split("\n<|endoftext|>\n")
    ids = [t for one in documents for t in [*tokenizer(one)["input_ids"], tokenizer.eos_token_id]]
    nll, before, moved = [], [], []
    for start in range(0, len(ids), length):
        block = torch.tensor([ids[start : start + length]])
        with torch.no_grad():
            now, then = (m(input_ids=block).logits[0, :-1].double().log_softmax(-1) for m in (student, raw))
        labels = block[0, 1:, None]
        nll += (-now.gather(-1, labels)).flatten().tolist()
        before += (-then.gather(-1, labels)).flatten().tolist()
        moved += (then.exp() * (then - now)).sum(-1).tolist()
    mean = {name: sum(of) / len(of) for name, of in (("nll", nll), ("before", before), ("moved", moved))}
    return dict(zip(NAMES, (math.exp(mean["nll"]), math.exp(mean["before"]), mean["moved"]), strict=False))


def recall_by_hand(path: Path, facts: Path) -> float:
    model, tokenizer = opened(path)
    right = []
    for line in facts.read_text().splitlines():
        fact = json.loads(line)
        prompt = torch.tensor([tokenizer(fact["prompt"])["input_ids"]])
        wanted = tokenizer(fact["prompt"] + fact["completion"])["input_ids"][prompt.shape[1] :]
        options = {"max_new_tokens": len(wanted), "do_sample": False, "eos_token_id": None}
        own = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        right.append(own.tolist() == wanted)
    return 100 * sum(right) / len(right)


def test_text_and_facts_before_and_after_without_a_raw_student_in_the_loss(
    train: Train, world: World, text: Path, facts: Path
) -> None:
    run = train(
        "sft", f"{KEY}.text={text}", f"{KEY}.facts={facts}", "evaluation.measures.rows=null", "data.max_length=100"
    )
    summary = run.read_summary()
    expected = text_by_hand(run, world, text, 100)
    expected["fact_recall"] = recall_by_hand(run.student, facts)
    expected["fact_recall_before"] = recall_by_hand(world.root / "student_raw", facts)
    assert {name: summary[f"retained/{name}"] for name in NAMES} == pytest.approx(expected, rel=1e-4)
    assert summary["retained/fact_recall_before"] > summary["retained/fact_recall"]
    assert summary["val/kl_raw_student"] > 0
    measured = summary["meta"]["measured"]
    assert (measured["retained/facts"]["rows"], measured["retained/text"]["references"]) == (len(WORDS), "live")


def test_no_raw_student_is_loaded_where_the_user_said_no(
    train: Train, text: Path, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("deltakd.evaluation.measured_references.open_reference", loads)
    given = (f"{KEY}.text={text}", f"{KEY}.facts={facts}", "evaluation.measures.rows=3")
    summary = train("sft", *given, "evaluation.measures.references=none").read_summary()
    there = {key.removeprefix("retained/") for key in summary if key.startswith("retained/")}
    assert there == {"perplexity", "fact_recall"}
    assert summary["meta"]["measured"]["retained/facts"]["rows"] == 3


def test_a_fact_is_recalled_if_all_its_tokens_are() -> None:
    assert float(recalled(torch.tensor([1.0, 1, 0, 1, 1, 1]), [2, 2, 0, 1, 1])) == 3


def test_mistakes_show_before_training(world: World, tmp_path: Path) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [{"instruction": "Where is Ann?", "response": "Rome"}])
    for value, message in (
        (f"{KEY}.text=nowhere.txt", r"evaluation.measures.retained.text: .*nowhere.txt"),
        (f"{KEY}.facts={bad}", r"row 0 .* has no prompt with a completion; give records such as"),
        ("evaluation.sets={retained: x.jsonl}", "can't be called val, train, retained or meta"),
    ):
        generate = "evaluation=default" if "sets" in value else "evaluation=none"
        overrides = world.overrides(tmp_path / "run", "sft", value, generate, "evaluation.measures.rows=8")
        with pytest.raises(ConfigError, match=message):
            run_training(make_settings(compose_config("train", overrides)), tmp_path / "run")
