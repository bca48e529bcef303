"""Identifies the model of a role: its path, its files' checksum, its commit on the hub, and its size."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from deltakd.models.settings import ModelSettings, ModelSpec
from deltakd.types import STUDENT, STUDENT_RAW

#: Configurations of a model, and of an adapter.
CONFIGS = ("config.json", "adapter_config.json")


def spec_of(models: ModelSettings, role: str) -> ModelSpec | None:
    """Return where a role's model comes from; with LoRA the raw student is the student's base model."""
    return models.specs.get(STUDENT if role == STUDENT_RAW and models.lora is not None else role)


def model_identity(spec: ModelSpec) -> dict[str, Any]:
    """Return what identifies a model: ``path``, ``dtype``, ``quantization``, files' ``sha256``, hub ``commit``.

    A model with an adapter also has ``adapter``, with the adapter's ``path`` and ``sha256``.
    """
    path = str(spec.path)
    snapshot = None if Path(path).is_dir() else hub_snapshot(path)
    files = Path(path) if Path(path).is_dir() else snapshot
    adapter = {} if spec.adapter is None else {"adapter": _adapter_identity(spec.adapter)}
    return adapter | {
        "path": path,
        "dtype": spec.dtype,
        "quantization": spec.quantization,
        "sha256": None if files is None else model_fingerprint(files),
        "commit": None if snapshot is None else snapshot.name,
    }


def _adapter_identity(path: str) -> dict[str, str | None]:
    return {"path": path, "sha256": model_fingerprint(path)}


def model_version(path: str) -> str | None:
    """Return the fingerprint of a local directory or the commit of a cached hub model; None if neither is here."""
    snapshot = None if Path(path).is_dir() else hub_snapshot(path)
    return model_fingerprint(path) if snapshot is None else snapshot.name


def model_fingerprint(path: str | Path) -> str | None:
    """Return the sha256 over a local model's weights and configuration; None if the directory has none.

    It shows if a model has been replaced by another one.
    """
    digest = hashlib.sha256()
    files = sorted(p for p in Path(path).glob("*") if p.suffix in (".safetensors", ".bin") or p.name in CONFIGS)
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest() if files else None


def hub_snapshot(name: str) -> Path | None:
    """Return the folder of a model in the local hub cache, named after its commit.

    None if it is not cached, or ``name`` is not a valid hub id.
    """
    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def count_parameters(models: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return role -> number of parameters (tied ones once)."""
    return {role: sum(_count(p) for p in model.parameters()) for role, model in models.items()}


def trained_parameters(student: nn.Module) -> int:
    """Return the number of parameters that training changes."""
    return sum(_count(p) for p in student.parameters() if p.requires_grad)


def exported_parameters(student: nn.Module) -> int:
    """Return the number of parameters once an adapter is merged into the weights (tied ones once)."""
    return sum(_count(p) for name, p in student.named_parameters() if ".lora_" not in name)


def _count(parameter: torch.Tensor) -> int:
    # 4-bit weights are packed in pairs; quant_state keeps the original shape.
    packed = getattr(parameter, "quant_state", None)
    # ZeRO 3 leaves an empty tensor with the number of elements in an attribute.
    whole = int(getattr(parameter, "ds_numel", parameter.numel()))
    return math.prod(packed.shape) if packed is not None else whole
