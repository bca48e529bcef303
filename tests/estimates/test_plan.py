"""``deltakd.plan``: what it prints, and what it says to those who ask for what can't be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deltakd import plan
from tests.tiny import World

SIZES = ["--student", "qwen2.5-0.5b", "--teacher", "qwen2.5-1.5b", "--gpus", "2,4"]


def test_a_training_part_by_part(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    plan.main([*world.overrides(tmp_path / "run", "kd"), "trainer.devices=8", "--tflops", "100"])
    printed = capsys.readouterr().out
    for part in ("DDP on 8", "memory of a process, cuda", "reference teacher", "student, backward", "6 steps: "):
        assert part in printed
    assert list(tmp_path.iterdir()) == []


def test_sizes_without_models(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    ways = ["--strategies", "deepspeed_zero2+shard,fsdp+cached", "--tflops", "100", "--tokens", "1e8"]
    plan.main([*SIZES, *ways, "--gpu-memory", "16", "loss=kd", "data.batch_size=2"])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "ZeRO 2" in line or "FSDP2" in line]
    assert len(lines) == 8
    assert {line.split()[-1] for line in lines[:4]} <= {"yes", "tight", "no"}
    hours = [float(line.split()[-1]) for line in lines[4:]]
    assert hours[0] > hours[2] > 0, "twice the GPUs, half the hours"
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([*SIZES, "--strategies", "zero4"], "'zero4' is not a strategy; allowed: auto, ddp,"),
        ([*SIZES, "--strategies", "fsdp+half"], "after + comes one of replicate, shard, cached, not 'half'"),
        ([*SIZES[:4], "--gpus", "0"], "'0' is not a whole number above 0"),
        ([*SIZES, "--tflops", "-1"], "'-1' is not a number above 0"),
        ([*SIZES, "--tokens", "1e9"], "hours need --tflops"),
        (["--student", "gpt9", *SIZES[2:]], "--student 'gpt9' is not an architecture; give one of qwen2.5-0.5b"),
        (["--student", "{model_type: gpt2}", *SIZES[2:]], "a mapping with model_type, vocab_size and its sizes"),
        (["--paper", *SIZES[:2]], "--paper names the models"),
        (SIZES[:4], "--student, --teacher and --gpus go together"),
        (["loss=kd", "--gpus", "8"], "a training run has trainer.devices=8 strategy=..."),
    ],
)  # fmt: skip
def test_what_can_not_be(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        plan.main(given)
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("columns", [None, "80"])
def test_nothing_is_cut_in_a_pipe_or_on_a_narrow_terminal(
    columns: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    plan.main([*SIZES, "--strategies", "deepspeed_zero3_offload+shard", "--tflops", "100"])
    out = capsys.readouterr().out
    assert "…" not in out
    assert re.search(r"ZeRO 3 offload +sharded", out)


def test_it_says_which_sizes_it_assumed_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([*SIZES, "--strategies", "ddp", "data.batch_size=2"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Parameters: student " in out
    assert "A micro-batch: 2 rows of 2,048 tokens" in out
    assert "Not given, so taken as usual for models of this size: trainer.precision=bf16-mixed," in out
    assert "data.max_length=2048." in out
