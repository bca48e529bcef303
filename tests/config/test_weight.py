"""Composing a config costs next to nothing: what it imports, in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "command", ["init", "train", "evaluate", "generate", "cache", "study", "search", "report", "export", "plan", "runs"]
)
def test_a_command_is_imported_without_torch(command: str) -> None:
    found = imported(f"import deltakd.{command}")
    assert not found & HEAVY
