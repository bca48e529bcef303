"""What is written down about a run: where it ran, with what, at what cost; and the model card."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

PACKAGES = (
    "deltakd",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "datasets",
    "hydra-core",
    "torchmetrics",
    "peft",
)


def environment() -> dict[str, Any]:
    """Git commit, package versions, machine and device."""
    return {
        "git_commit": git_commit(),
        "packages": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def git_commit() -> str | None:
    """The checkout's commit, with ``-dirty`` where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_memory_mib() -> float:
    """Peak memory in MiB: of the GPU where there is one, else of this process since it started."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def count_parameters(models: Mapping[str, nn.Module]) -> dict[str, int]:
    """Role -> number of parameters (tied ones once)."""
    return {role: sum(_count(p) for p in model.parameters()) for role, model in models.items()}


def _count(parameter: torch.Tensor) -> int:
    # Weights of 4 bits are packed by two; what they were is kept beside them.
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else parameter.numel()


def model_fingerprint(path: str | Path) -> str | None:
    """sha256 over a local model's weights and configuration; None where there is no such directory.

    It tells another model in the same place from the one that was there before.
    """
    digest = hashlib.sha256()
    files = sorted(p for p in Path(path).glob("*") if p.suffix in (".safetensors", ".bin") or p.name == "config.json")
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest() if files else None


def hub_snapshot(name: str) -> Path | None:
    """The folder of the local hub cache that holds the model ``name``, called as its commit; None: it is not there."""
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def model_card(
    config: Mapping[str, Any], roles: Sequence[str], metrics: Mapping[str, float], commit: str | None
) -> str:
    """Markdown for the exported student: how it was made and what it scored on validation data."""
    loss = config["loss"]
    paths = {role: config["model"][role]["path"] or "from scratch" for role in roles}
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [deltakd, distillation]",
        "---",
        f"# {config['name']}",
        "",
        f"A language model trained with deltakd (loss `{loss['_target_'].rsplit('.', 1)[-1]}`, commit {commit}).",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {role} | {path} |" for role, path in paths.items()),
        f"| delta_weight | {config['delta_weight']} |",
        f"| training data | {config['data']['train']} |",
        f"| template | {config['data']['template']} |",
        f"| seed | {config['seed']} |",
        *(f"| {name} | {value:.4f} |" for name, value in metrics.items()),
        "",
        "Open it with `transformers.AutoModelForCausalLM.from_pretrained`; no other code is needed.",
        "",
    ]
    return "\n".join(lines)
