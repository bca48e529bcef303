"""The costs of writing responses, against what a counter and the cache itself say."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.estimates.costs import Setting, memory, while_writing
from deltakd.estimates.layout import Layout
from deltakd.estimates.memory import show_memory
from deltakd.estimates.sizes import Skeleton
from deltakd.estimates.work import operations, writing_operations, writing_seconds
from deltakd.estimates.writing import Writing, token_bytes
from deltakd.generation import Decoding
from deltakd.generation.full_batch import DecodingState
from deltakd.generation.generator import sample
from deltakd.generation.model_step import Mixture, Step
from deltakd.generation.noise import NoiseKey
from deltakd.models import ModelSpec
from deltakd.plan import main as plan
from tests.tiny import World

V = 300


def made(family: str = "llama", width: int = 32) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    config = AutoConfig.for_model(family, vocab_size=V, **sizes, **rope, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def skeleton(model: Any) -> Skeleton:
    return Skeleton(model, ModelSpec())


def writing(**changed: Any) -> Writing:
    usual = {"responses": 6.0, "per_prompt": 3, "batch": 6, "prompt": 20, "response": 12, "every": 1}
    return Writing(**(usual | {"mixes_teacher": False, "scored": False} | changed))


@pytest.mark.parametrize("mixture", [False, True])
def test_operations_are_those_of_the_generator(mixture: bool) -> None:
    student, teacher = made(), made(width=48)
    count = writing()
    keys = [[NoiseKey(0, row, 1, number) for number in range(3)] for row in range(2)]
    with FlopCounterMode(display=False) as counter:
        sample(
            student, [[5] * 20, [6] * 20], keys, decoding=Decoding(max_new_tokens=12), batch_size=6,
            eos_ids=frozenset(), vocab_size=V, pad_id=0, mixture=Mixture(teacher, 0.2) if mixture else None,
        )  # fmt: skip
    models = [student, teacher] if mixture else [student]
    expected = sum(count.operations(skeleton(model)) for model in models)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_cache_of_a_token_is_exact(family: str) -> None:
    model = made(family)
    rows = [row[0] for row in _rows()]
    state = DecodingState.of(rows, 0, torch.device("cpu"))
    with torch.no_grad():
        Step(model, Decoding().processors(), V)(state)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in state.cache.layers)
    assert held == 2 * 20 * token_bytes(skeleton(model), 4)


def _rows() -> list[Any]:
    from deltakd.generation.generator import _rows as rows

    return [rows(number, [5] * 20, [NoiseKey(0, number, 1)], Decoding(), None) for number in range(2)]


def setting(layout: Layout | None = None, **changed: Any) -> Setting:
    student, teacher = skeleton(made()), skeleton(made(width=48))
    return Setting(student, {"teacher": teacher}, layout or Layout(), 128, 32, 128, writing=writing(**changed))


def test_writing_counts_in_memory_operations_and_time() -> None:
    alone, mixed = setting(), setting(mixes_teacher=True, scored=True)
    sizes = {need.what for need in while_writing(alone)}
    assert {"key-value cache", "logits of the batch"} <= sizes
    # A batch that dwarfs the training step is the peak.
    wide = setting(batch=2000)
    cache = sum(need.bytes for need in memory(wide) if need.what == "key-value cache")
    assert cache == wide.writing.cache_bytes(wide.student, 4) > 0  # type: ignore[union-attr]
    for one in (alone, mixed):
        assert all(part in operations(one) for part in writing_operations(one))
    assert [part.what for part in writing_operations(mixed)] == [
        "student, writes responses",
        "teacher, writes responses",
        "log-probs of the responses",
    ]
    assert writing_seconds(alone, 1.0, None) < writing_seconds(alone, 1.0, 1e-3)
    assert writing_seconds(alone, 1e-9, 1e9) == writing_seconds(alone, 1e-9, None)


def test_a_sharded_student_is_whole_while_it_writes() -> None:
    def whole(layout: Layout) -> list[int]:
        return [need.bytes for need in while_writing(setting(layout)) if need.what == "whole student, to write"]

    assert whole(Layout("ddp", 4)) == [0]
    for layout in (Layout("fsdp", 4), Layout("deepspeed", 4, stage=3)):
        assert whole(layout) == [setting().student.weight_bytes]


CHOSEN = ("rollout=student", "rollout.decoding.max_new_tokens=30")


@pytest.mark.parametrize(
    ("options", "responses", "batch"),
    [
        ((), 4, 4),
        (("rollout.fraction=0.5",), 2, 2),
        (("rollout.every=3", "rollout.batch_size=8"), 4, 8),
        # At first, all are new.
        (("rollout.replay.size=5",), 2, 4),
        (("rollout.fraction=0.5", "rollout.replay.adaptive=true"), 2, 2),
        (("loss=dpkd",), 2, 2),
    ],
)
def test_what_a_config_writes(
    world: World, tmp_path: Path, options: tuple[str, ...], responses: float, batch: int
) -> None:
    from deltakd.estimates.memory import setting_of

    chosen = world.overrides(tmp_path, "kd", *CHOSEN, *options)
    found = setting_of(make_settings(compose_config("train", chosen)), "cpu", "cpu").writing
    assert found is not None
    assert (found.responses, found.batch, found.prompt, found.response) == (responses, batch, 90, 30)


def test_the_dry_run_and_the_plan_show_responses_beside_training(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = world.overrides(tmp_path / "run", "kd", *CHOSEN)
    out = io.StringIO()
    show_memory(make_settings(compose_config("train", chosen)), Console(file=out, width=120))
    assert "while responses are written, in MiB" in out.getvalue()
    assert "Responses: 4 a step of a process, up to 30 tokens each, " in out.getvalue()
    plan([*chosen, "--tflops", "1", "--bandwidth", "20"])
    said = " ".join(capsys.readouterr().out.split())
    assert "key-value cache" in said
    assert "student, writes responses" in said
    assert "Responses: 4 a step of a process, 30 tokens each at the most, after prompts of up to 90; 4 decoded" in said
    assert "% of the time." in said
