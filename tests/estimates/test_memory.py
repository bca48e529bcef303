from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.estimates import memory
from deltakd.estimates.memory import estimate, show_memory
from deltakd.estimates.sizes import Skeleton
from deltakd.models import ModelSpec
from deltakd.training.settings import RunSettings
from tests.tiny import World, save_model


def plan_of(world: World, tmp_path: Path, loss: str, *extra: str) -> RunSettings:
    return make_settings(compose_config("train", world.overrides(tmp_path / "run", loss, *extra)))


def sizes(plan: RunSettings) -> dict[str, int]:
    return {need.what: need.bytes for need in estimate(plan)}


def test_what_is_known_exactly(world: World, tmp_path: Path) -> None:
    student, teacher = (
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(world.root / name).parameters())
        for name in ("student_raw", "teacher")
    )
    found = sizes(plan_of(world, tmp_path, "delta_kd", "model.teacher.dtype=bfloat16"))
    assert found["weights of the student"] == found["gradients"] == 4 * student
    assert found["optimiser (AdamW)"] == 8 * student
    assert found["reference teacher"] == found["reference teacher_raw"] == 2 * teacher
    assert found["reference student_raw"] == 4 * student
    half = sizes(plan_of(world, tmp_path, "sft", "trainer.precision=bf16-true"))
    assert half["weights of the student"] == half["gradients"] == half["optimiser (AdamW)"] // 2 == 2 * student
    assert not any("reference" in what for what in half)


def test_lora_trains_little_and_needs_no_second_student(world: World, tmp_path: Path) -> None:
    found = sizes(plan_of(world, tmp_path, "delta_kd", "model/lora=default", "model.lora.r=2"))
    # r (in + out) of the four linear layers of each block: 16 → 48, 16 → 16, 16 → 64, 64 → 16.
    adapter = 4 * 2 * 2 * (64 + 32 + 80 + 80)
    assert found["gradients"] == adapter
    assert found["weights of the student"] - adapter == sizes(plan_of(world, tmp_path, "sft"))["weights of the student"]
    assert "reference student_raw" not in found


def test_quantised_layers_take_their_bits(world: World) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.root / "teacher")
    linear = 2 * 24 * (3 * 24 + 24 + 8 * 24)
    eight = ModelSpec(quantization={"quant_method": "bitsandbytes", "load_in_8bit": True})
    plain, packed = Skeleton(model, ModelSpec()), Skeleton(model, eight)
    assert plain.weight_bytes - packed.weight_bytes == 3 * linear


@pytest.mark.parametrize(
    ("family", "options"), [("gpt2", {}), ("gpt2", {"attn_pdrop": 0.0}), ("llama", {}), ("opt", {})]
)
def test_activations_are_about_what_autograd_keeps(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, seed=1, family=family, width=64, **options))
    kept: dict[int, int] = {}
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(2, 90, (4, 96), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held until the end, so that no address is used twice.
        out = model.train().base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        measured = sum(kept.values())
    assert out.last_hidden_state.requires_grad
    skeleton = Skeleton(model, ModelSpec())
    matrix = skeleton.makes_attention_matrix("cpu", training=True)
    estimated = 4 * 2 * skeleton.layer_elements(ids.numel(), ids.shape[1], matrix)
    assert estimated == pytest.approx(measured, rel=0.3)


def test_what_makes_a_step_smaller(world: World, tmp_path: Path) -> None:
    plain = sizes(plan_of(world, tmp_path, "kd"))["activations of the student"]
    for fewer in ("model.gradient_checkpointing=true", "data.batch_size=2", "trainer.precision=bf16-mixed"):
        assert sizes(plan_of(world, tmp_path, "kd", fewer))["activations of the student"] < plain
    budget = ("data.batch_size=null", "data.max_tokens_per_batch=480")
    assert sizes(plan_of(world, tmp_path, "kd", *budget))["activations of the student"] == plain


def test_the_table_has_a_column_a_device_and_warns(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there = {"cpu": 2**19, "cuda:1": None}
    monkeypatch.setattr(memory, "available", there.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = plan_of(
        world, tmp_path, "kd", "reference.placement=cuda:1", "kernels.memory_budget=64", "trainer.dry_run=true"
    )
    shown = StringIO()
    show_memory(plan, Console(file=shown, width=100))
    lines = shown.getvalue().splitlines()
    assert any("cpu" in line and "cuda:1" in line for line in lines)
    assert any("there is" in line and "0 " in line and "?" in line for line in lines)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("cpu: about ")
    assert "but there are 0 MiB" in warning


@pytest.mark.slow
def test_a_dry_run_loads_and_writes_nothing(world: World, tmp_path: Path) -> None:
    student = tmp_path / "no_weights"
    student.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (student / name).write_bytes((world.root / "student_raw" / name).read_bytes())
    arguments = world.overrides(tmp_path / "run", "sft", f"model.student.path={student}", "trainer.dry_run=true")
    done = subprocess.run(
        [sys.executable, "-m", "deltakd.train", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "all together" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no_weights"]
