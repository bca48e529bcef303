"""What composing a config and telling what is wrong in it import, in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import World

ROOT = Path(__file__).resolve().parents[2]

#: All of our own that composing may import.
OURS = {
    "deltakd",
    "deltakd.config",
    "deltakd.config.compose",
    "deltakd.config.folders",
    "deltakd.distributed",
    "deltakd.distributed.launchers",
    "deltakd.io",
    "deltakd.io.errors",
}
#: What would take seconds.
HEAVY = {
    "torch", "lightning", "lightning_fabric", "pytorch_lightning", "transformers", "tokenizers", "deepspeed", "peft",
    "datasets", "wandb", "optuna", "pandas", "scipy", "numpy", "matplotlib", "huggingface_hub",
}  # fmt: skip


def imported(code: str) -> set[str]:
    """The modules that a fresh interpreter has after running the code."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_composing_a_config_imports_hydra_and_errors_alone() -> None:
    found = imported(
        "from deltakd.config.compose import compose_config\n"
        "assert compose_config('train', ['experiment=delta_kd_gpt2', 'loss=kd']).loss.temperature == 1"
    )
    assert {name for name in found if name.split(".")[0] == "deltakd"} <= OURS
    assert not found & HEAVY
    assert "hydra" in found


#: What only training, models and scores need, in seconds of CPU: transformers' model classes 2, Lightning 1.5, the
#: compiler 1, DTensor 0.7, torchmetrics with SciPy and Matplotlib 2.
FOR_RIGHT_CONFIGS = {
    "lightning", "lightning.fabric", "transformers.modeling_utils", "torch._dynamo", "torch.distributed.tensor",
    "torchmetrics", "scipy", "matplotlib", "peft", "accelerate", "deepspeed", "datasets", "wandb", "pandas",
}  # fmt: skip


def test_what_is_wrong_in_a_config_is_told_without_lightning_and_models(world: World, tmp_path: Path) -> None:
    wrong = ["optim.lr=abc", "trainer.max_steps=0", "data.val=absent.jsonl", f"model.teacher.path={tmp_path / 'none'}"]
    overrides = world.overrides(tmp_path / "run", "delta_kd", "logger=[csv,wandb,tensorboard]", *wrong)
    code = (
        "import contextlib, io, runpy, sys\n"
        f"sys.argv = ['train', *{overrides}]\n"
        "with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.suppress(SystemExit):\n"
        "    runpy.run_module('deltakd.train', run_name='__main__')\n"
        "said = told.getvalue()\n"
        "assert said.startswith('error: 4 problems:'), said\n"
        "assert all(key in said for key in ('optim.lr', 'trainer.max_steps', 'data.val', 'model.teacher.path')), said"
    )
    found = imported(code)
    assert not found & FOR_RIGHT_CONFIGS
    # Its configs were read, and the loss was tried.
    assert {"torch", "transformers", "deltakd.losses.distillation"} <= found


@pytest.mark.parametrize(
    "command", ["init", "train", "evaluate", "generate", "cache", "study", "search", "report", "export", "plan", "runs"]
)
def test_a_command_is_imported_without_torch(command: str) -> None:
    found = imported(f"import deltakd.{command}")
    assert not found & HEAVY
