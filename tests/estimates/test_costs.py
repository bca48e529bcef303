from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.estimates.clusters import ARCHITECTURES, _skeleton
from deltakd.estimates.costs import Setting, memory
from deltakd.estimates.layout import REDUCE_BUCKET, Layout
from deltakd.estimates.memory import estimate, setting_of
from deltakd.estimates.sizes import Skeleton
from deltakd.estimates.work import operations, traffic
from deltakd.losses import Distillation, ForwardKL, delta_target
from deltakd.models import LanguageModel, ModelSpec
from deltakd.references import LiveReferences
from deltakd.training.settings import RunSettings
from deltakd.training.step import DistillationStep
from deltakd.types import Batch
from tests.tiny import WORDS, World, save_model, write_rows


@pytest.mark.parametrize(("name", "billions"), [("qwen2.5-1.5b", 1.54), ("qwen2.5-7b", 7.62), ("qwen2.5-72b", 72.7)])
def test_architectures_have_as_many_parameters_as_published(name: str, billions: float) -> None:
    assert _skeleton(ARCHITECTURES[name], "bfloat16").parameters / 1e9 == pytest.approx(billions, rel=5e-3)


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.88)])
def test_the_stages_of_zero_hold_what_their_paper_says(stage: int, gigabytes: float) -> None:
    """arXiv 1910.02054, figure 1: 7.5 billion numbers, mixed precision, 64 GPUs."""
    student = _skeleton(ARCHITECTURES["qwen2.5-7b"], "bfloat16", trained=True)
    held = Layout("deepspeed", 64, stage).held(student, 1, "bf16-mixed", False)
    state = held.weights + held.made + held.optimiser
    assert state * 7.5 / student.parameters == pytest.approx(gigabytes, rel=0.01)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_operations_are_those_that_pytorch_counts(tmp_path: Path, checkpointed: bool) -> None:
    def model(seed: int, width: int) -> LanguageModel:
        directory = save_model(tmp_path / f"{seed}", seed=seed, family="llama", width=width)
        # PyTorch doesn't count the fused attention of CPUs.
        hf = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
        return LanguageModel(hf, hf.config.vocab_size)

    roles = {"teacher": (1, 48), "teacher_raw": (2, 48), "student_raw": (3, 32)}
    references = {role: model(seed, width) for role, (seed, width) in roles.items()}
    student = model(4, 32)
    if checkpointed:
        student.causal_lm.gradient_checkpointing_enable()
    loss = Distillation(delta_target(1.0), ForwardKL())
    step = DistillationStep(student.train(), LiveReferences(references), loss)
    ids = torch.randint(2, 90, (4, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :10] = -100
    batch = Batch(ids, torch.ones_like(ids), labels, torch.arange(4), 0, 120)
    # Nor does it count products that are added in place.
    counted_too = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=counted_too) as counter:
        total, _ = step(batch)
        total.backward()
    sizes = {role: Skeleton(reference.causal_lm, ModelSpec()) for role, reference in references.items()}
    setting = Setting(
        Skeleton(student.causal_lm, ModelSpec()), sizes, Layout(), 160, 40, 120, checkpointed=checkpointed
    )
    counted = counter.get_total_flops()
    assert sum(part.amount for part in operations(setting)) == pytest.approx(counted, rel=0.05)


def test_adapters_spare_gradients_of_weights_and_the_second_student(world: World, tmp_path: Path) -> None:
    def parts(*extra: str) -> dict[str, float]:
        settings = make_settings(compose_config("train", world.overrides(tmp_path / "run", "delta_kd", *extra)))
        return {part.what: part.amount for part in operations(setting_of(settings, "cpu", "cpu"))}

    plain, adapted = parts(), parts("model/lora=default", "model.lora.r=1")
    assert plain["student, backward"] == 2 * plain["student, forward"]
    assert adapted["student, backward"] < 1.7 * adapted["student, forward"]
    assert adapted["reference student_raw"] == adapted["student, forward"]


def test_teachers_with_longer_rows_cost_as_much_more(world: World, tmp_path: Path) -> None:
    def parts(*extra: str) -> dict[str, float]:
        settings = make_settings(compose_config("train", world.overrides(tmp_path / "run", "delta_span", *extra)))
        # The references stay in the CPU's memory: what they give moves.
        setting = setting_of(settings, "cuda", "cpu")
        return {part.what: part.amount for part in (*operations(setting), *traffic(setting))}

    equal, longer = parts(), parts("data.teacher_max_length=240")
    moved = "hidden states of references"
    assert equal[moved] < longer[moved] < 3 * equal[moved]
    assert longer["reference teacher"] > 2 * equal["reference teacher"]
    assert longer["reference student_raw"] == equal["reference student_raw"]
    assert equal["heads"] < longer["heads"] < 2 * equal["heads"]


def test_pairs_of_teachers_share_the_work_of_routed_rows(world: World, tmp_path: Path) -> None:
    pairs = [f"+model.teacher{raw}_2.path={world.root / f'teacher{raw}'}" for raw in ("", "_raw")]
    both = [
        setting_of(
            make_settings(compose_config("train", world.overrides(tmp_path, "delta_kd", *options))), "cpu", "cpu"
        )
        for options in ((), (*pairs, "model.routes={a: 1, b: 2}"))
    ]
    one, two = (sum(part.amount for part in operations(setting)) for setting in both)
    assert two == pytest.approx(one, rel=1e-12)
    assert both[1].hidden_bytes == both[0].hidden_bytes
    assert set(both[1].references) == set(both[0].references) | {"teacher_2", "teacher_raw_2"}


def test_sharded_references_and_offloading_move_memory_to_traffic() -> None:
    teacher = _skeleton(ARCHITECTURES["qwen2.5-1.5b"], "bfloat16")
    student = _skeleton(ARCHITECTURES["qwen2.5-0.5b"], "bfloat16", trained=True)

    def costs(layout: Layout) -> tuple[dict[tuple[str, str], int], dict[str, float]]:
        setting = Setting(student, {"teacher": teacher}, layout, 512, 512, 512, 1, "bf16-mixed", "cuda", "cuda")
        needs = {(need.what, need.device): need.bytes for need in memory(setting)}
        return needs, {part.what: part.amount for part in traffic(setting)}

    whole, nothing = costs(Layout("deepspeed", 4, 3))
    part, gathered = costs(Layout("deepspeed", 4, 3, shards_references=True))
    assert part["reference teacher", "cuda"] == whole["reference teacher", "cuda"] // 4
    assert "references, all-gather" not in nothing
    assert gathered["references, all-gather"] == pytest.approx(0.75 * teacher.weight_bytes)
    away, moved = costs(Layout("deepspeed", 4, 3, offload=True))
    assert ("optimiser (AdamW)", "cpu") in away
    assert ("weights of the student", "cuda") not in away
    assert moved["weights and gradients, from and to RAM"] > 0


# Real processes (`make test-slow`).

STRATEGIES = {
    "auto": ["trainer.devices=1"],
    "ddp": ["trainer.devices=2"],
    "deepspeed_zero1": ["trainer.devices=2"],
    "deepspeed_zero2": ["trainer.devices=2", "trainer.accumulate_grad_batches=2"],
    "deepspeed_zero3": ["trainer.devices=2", "strategy.persistence_threshold=0"],
    "fsdp": ["trainer.devices=2", "trainer.accumulate_grad_batches=2"],
}
#: What PyTorch calls the collectives, and the share of the bytes of a call that each of two ranks sends.
COLLECTIVES = {"allreduce_": 1.0, "_allgather_base_": 0.5, "_reduce_scatter_base_": 0.5}


@pytest.fixture(scope="module")
def larger_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Models whose tensors outweigh all else, and rows that fill the whole length."""
    root = tmp_path_factory.mktemp("larger")
    sizes = {"n_layer": 6, "n_head": 4}
    save_model(root / "student_raw", seed=1, width=128, **sizes)
    for seed, name in enumerate(("teacher", "teacher_raw"), 2):
        save_model(root / name, seed=seed, width=192, **sizes)
    draw = random.Random(0)
    answers = [" ".join(draw.choices(WORDS, k=120)) for _ in range(200)]
    write_rows(root / "train.jsonl", [{"instruction": "Say", "context": "it", "response": a} for a in answers])
    return World(root)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_real_step_takes_and_sends_what_is_estimated(strategy: str, larger_world: World, tmp_path: Path) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    overrides = larger_world.overrides(
        tmp_path / "run",
        "delta_kd",
        "data.val=null",
        "trainer.accelerator=cpu",
        f"strategy={strategy}",
        *STRATEGIES[strategy],
    )
    script = Path(__file__).with_name("measured_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=larger_world.root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    settings: RunSettings = make_settings(compose_config("train", overrides))
    estimated = sum(need.bytes for need in estimate(settings))
    expected = sum(part.amount for part in traffic(setting_of(settings, "cpu", "cpu")))
    # DeepSpeed's buckets have one size whatever the model's: here they would hide all else.
    buckets = REDUCE_BUCKET * 4 * {"deepspeed_zero3": 1, "deepspeed_zero1": 2, "deepspeed_zero2": 2}.get(strategy, 0)
    files = sorted(tmp_path.glob("[0-9].json"))
    assert len(files) == settings.trainer.devices
    for file in files:
        measured = json.loads(file.read_text())
        assert estimated - buckets == pytest.approx(measured["peak"] - buckets, rel=0.25)
        sent = sum(share * measured["collectives"].get(name, 0) for name, share in COLLECTIVES.items())
        assert sent == pytest.approx(expected, rel=0.05, abs=100)
