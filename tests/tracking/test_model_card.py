"""A model card says how to use the model, what was trained, and what its loss figures are distances to."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from deltakd import losses
from deltakd.data import InstructionData, TextData
from deltakd.generation.decoding import Decoding
from deltakd.io.run_directory import RunDirectory
from deltakd.losses.schedules import make_schedule
from deltakd.tracking.card_usage import distances, hub_ids, usage

Train = Callable[..., RunDirectory]


def stored(run: RunDirectory) -> int:
    with safe_open(run.student / "model.safetensors", "pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 - no mapping


def test_after_lora_the_card_counts_the_merged_file_and_names_the_adapter(train: Train) -> None:
    run = train("kd", "model/lora=default", "trainer.max_steps=1", "model.lora.r=4")
    card, meta = (run.student / "README.md").read_text(), run.read_summary()["meta"]
    assert meta["exported_parameters"] == stored(run) < meta["parameters"]["student"]
    trained = meta["parameters"]["student"] - stored(run)
    assert f"A language model of {stored(run):,} parameters" in card
    assert f"| trained parameters | {trained:,} (LoRA adapter of rank 4, alpha 32, dropout 0, on all-linear; " in card


def test_the_code_on_the_card_runs_and_the_command_works_from_another_folder(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("sft", "trainer.max_steps=1")
    card = (run.student / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.S)[0]
    monkeypatch.chdir(run.student)
    exec(code, {})
    assert capsys.readouterr().out.strip() or "max_new_tokens=8" in code
    monkeypatch.chdir(tmp_path)
    cd, command = re.findall(r"^    (cd .*)\n    (python -m deltakd.train .*)$", card, re.M)[0]
    given = shlex.split(command)
    assert Path(shlex.split(cd)[1]).is_dir()
    folder = Path(given[given.index("--config-dir") + 1])
    assert folder == run.path
    assert (folder / "config.yaml").is_file()
    assert f"run_dir={run.path}_again" in given


def test_the_form_of_a_question_is_that_of_the_template() -> None:
    decoding = Decoding(max_new_tokens=7)
    chat = usage(InstructionData(train="x.jsonl", template="chat"), decoding)
    assert "tokenizer.apply_chat_template(" in chat
    assert 'prompt = "Once upon a time"' in usage(TextData(train="x.txt"), decoding)
    alpaca = usage(InstructionData(train="x.jsonl"), decoding)
    assert "### Instruction:\\nName three colours.\\n\\n### Response:\\n" in alpaca
    assert "max_new_tokens=7" in alpaca
    assert "{input}" in alpaca


def test_each_loss_figure_says_what_it_is_a_distance_to() -> None:
    ramp = make_schedule({"schedule": "linear", "from": 0.0, "to": 2.0}, "delta_weight")
    loss = losses.Distillation(losses.delta_target(0.5), losses.ReverseKL(), temperature=2.0, ce_weight=0.25)
    said = dict(distances(loss, ["val/loss", "val/ce", "val/reverse_kl", "test/kl_teacher", "val/rougeL"]))
    assert said["`reverse_kl`"] == (
        "reverse KL of this model from the target teacher + 0.5 · (student_raw − teacher_raw) (in logits), "
        "at temperature 2"
    )
    assert said["`loss`"] == "what was minimised: λ · CE(labels) + (1 − λ) · D(target, student), per token, λ = 0.25"
    assert list(said) == ["`loss`", "`ce`", "`kl_teacher`", "`reverse_kl`"]
    moving = losses.Distillation(losses.shift_target(ramp), losses.ForwardKL())
    assert "which changes in training" in dict(distances(moving, ["val/forward_kl"]))["`forward_kl`"]
    assert [name for name, _ in distances(losses.SupervisedFineTuning(), ["val/loss", "val/ce"])] == ["`loss`", "`ce`"]


def test_only_hub_ids_stand_in_the_head_of_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "student").mkdir(parents=True)
    sources = ["Qwen/Qwen3-0.6B", "outputs/student", "data/x.jsonl", "/a/b", "a/b:c.jsonl", "a/b#k=v", None]
    assert hub_ids(sources) == ["Qwen/Qwen3-0.6B", "a/b"]
