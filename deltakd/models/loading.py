"""Loading models from the Hugging Face hub or a local directory, or building them from a configuration."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from deltakd.io.hub import hub_reachable
from deltakd.models.activations import fuse_activations
from deltakd.models.causal import check_causal
from deltakd.models.image_models import IMAGE_FAMILIES, auto_class
from deltakd.models.quantization import quantization_config, quantization_problems
from deltakd.models.settings import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.distributed.configuration_utils import DistributedConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def spec_problems(role: str, spec: ModelSpec) -> list[str]:
    """Return the problems with ``model.<role>``, one sentence each; nothing is fetched."""
    key = f"model.{role}"
    found = []
    if spec.init == "random" and not (spec.architecture or {}).get("model_type"):
        found.append(f"{key}.init=random needs {key}.architecture with a model_type (gpt2, llama, ...)")
    elif spec.init == "random":
        found += _image_problems(key, spec.architecture or {})
    elif spec.init == "pretrained" and not spec.path:
        found.append(f"{key}.path is missing; give a hub id or a local directory: {key}.path=...")
    elif spec.init == "pretrained" and spec.path:
        found += _path_problems(key, spec.path)
    if spec.quantization is not None and spec.init == "random":
        found.append(f"{key}.quantization is given for a model from scratch; remove it, or give {key}.path")
    return found + quantization_problems(f"{key}.quantization", spec.quantization)


def _image_problems(key: str, architecture: Mapping[str, Any]) -> list[str]:
    """Return what the architecture of a new image model lacks; its defaults are those of its best-known checkpoint."""
    if architecture["model_type"] not in IMAGE_FAMILIES:
        return []
    needed = ("text_config", "vision_config", "image_token_id")
    missing = [name for name in needed if architecture.get(name) is None]
    if not missing:
        return []
    return [
        f"{key}.architecture is that of an image model, and lacks {', '.join(missing)}; give the sizes of its text "
        "decoder and its vision tower, and the id that the token for an image has in the tokenizer"
    ]


def _path_problems(key: str, path: str) -> list[str]:
    if os.path.isdir(path):
        if (Path(path) / "config.json").is_file():
            return []
        return [f"{key}.path={path} is a directory without config.json; give a Hugging Face model directory"]
    if _HUB_ID.fullmatch(path):
        return []
    return [f"{key}.path={path}: no such directory (and not a hub id, which would be `name` or `owner/name`)"]


def _reason(path: str, error: Exception) -> str:
    """Return, in one line, why a model is not available."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if os.path.isdir(path):
        return first
    if not hub_reachable():
        return "it is not in the local cache, and the Hugging Face hub can't be reached"
    return f"the Hugging Face hub does not give it ({first[:160]})"


def load_config(
    role: str, spec: ModelSpec, *, vocabulary: int = 0, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Load only the configuration: a cheap, early test that the model is available.

    Args:
        role: for the messages.
        spec: where it comes from.
        vocabulary: number of tokens, for a model from scratch.
        trust_remote_code: passed on.

    Raises:
        NotCausalError: it is an encoder, or another model that does not predict the next token.
        ValueError: in one line: the model, why it is not available, and how to give a local path.
    """
    if spec.init == "random":
        config = _architecture(role, spec, vocabulary, None)
        check_causal(f"model.{role}.architecture", config)
        return config
    assert spec.path is not None
    try:
        config = AutoConfig.from_pretrained(
            spec.path, trust_remote_code=trust_remote_code, local_files_only=not hub_reachable()
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model.{role}.path={spec.path}: {_reason(spec.path, error)}; "
            f"to use a local copy give model.{role}.path=/path/to/model_directory"
        ) from None
    check_causal(f"model.{role}.path={spec.path}", config)
    return config


def load_model(
    role: str,
    spec: ModelSpec,
    *,
    vocabulary: int,
    eos_token_id: int | None = None,
    seed: int = 0,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    tensor_parallel: bool = False,
) -> PreTrainedModel:
    """Load or build the causal language model of a role, in its own dtype.

    Args:
        role: for the messages.
        spec: where it comes from.
        vocabulary: number of tokens, and of embedding rows in a model from scratch.
        eos_token_id: the tokenizer's, for a model from scratch.
        seed: for the weights of a model from scratch.
        attn_implementation: passed on to transformers (sdpa, eager, flash_attention_2, ...).
        trust_remote_code: passed on; off unless the user asks.
        tensor_parallel: split its layers over all processes by transformers' plan for it. Collective if so.

    Raises:
        ValueError: the model is not available, its weights don't fit its architecture, or there is no plan to split it.
    """
    if spec.init == "random":
        return _build_model(role, spec, vocabulary, eos_token_id, seed, attn_implementation)
    config = load_config(role, spec, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {}
    if spec.quantization is not None:
        options["quantization_config"] = quantization_config(spec.quantization)
    if tensor_parallel:
        options["distributed_config"] = _tensor_plan(role, spec, config)
    try:
        loaded: Any = auto_class(config).from_pretrained(
            str(spec.path),
            config=config,
            dtype=DTYPES[spec.dtype],
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            local_files_only=not hub_reachable(),
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ValueError(f"model.{role}.path={spec.path}: {_reason(str(spec.path), error)}") from None
    model, info = loaded
    missing = sorted(info["missing_keys"]) + [str(m[0]) for m in info["mismatched_keys"]]
    if missing:
        raise ValueError(
            f"model.{role}.path={spec.path} is not a causal language model of type {config.model_type}: "
            f"{len(missing)} weights are absent or of another shape (first: {missing[0]}) and would be random; "
            "give a checkpoint of that architecture"
        )
    return fuse_activations(model)


def _tensor_plan(role: str, spec: ModelSpec, config: PretrainedConfig) -> DistributedConfig:
    """Return how transformers splits a model's layers over all processes; its head stays whole.

    Raises:
        ValueError: it has no plan.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    if not getattr(config, "base_model_tp_plan", None):
        raise ValueError(
            f"model.{role}.path={spec.path}: transformers has no plan to split {config.model_type} by tensor "
            "parallelism; give reference.sharding=shard"
        )
    model: Any = auto_class(config)._model_mapping[type(config)]
    whole = dict.fromkeys(getattr(model, "_tp_plan", None) or {}, "replicate")
    return DistributedConfig(tp_size=dist.get_world_size(), tp_plan=whole or "auto")


def load_skeleton(
    role: str,
    spec: ModelSpec,
    *,
    vocabulary: int,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return the role's model without weights, on ``meta``: its parameters' shapes, dtypes and ties are exact.

    Raises:
        ValueError: as ``load_config``.
    """
    config = load_config(role, spec, vocabulary=vocabulary, trust_remote_code=trust_remote_code)
    # Built unquantised: from_pretrained quantises layers only while loading them.
    config.__dict__.pop("quantization_config", None)
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=DTYPES[spec.dtype], **options)


def _architecture(role: str, spec: ModelSpec, vocabulary: int, eos_token_id: int | None) -> PretrainedConfig:
    # A model type's default special tokens belong to its best-known checkpoint, not to this tokenizer.
    tokens = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id, "pad_token_id": None}
    tokens["vocab_size"] = vocabulary
    architecture = dict(spec.architecture or {})
    kind = architecture.pop("model_type")
    if kind in IMAGE_FAMILIES:
        architecture["text_config"] = tokens | dict(architecture["text_config"])
    else:
        architecture = tokens | architecture
    key = f"model.{role}.architecture"
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else "; give gpt2, llama, qwen3, ..."
        raise ValueError(f"{key}.model_type is {kind!r}, which transformers does not know{hint}")
    try:
        return AutoConfig.for_model(kind, **architecture)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{key} is not a valid {kind}: {' '.join(str(error).split())}; correct its keys") from None


def _build_model(
    role: str, spec: ModelSpec, vocabulary: int, eos_token_id: int | None, seed: int, attn_implementation: str | None
) -> PreTrainedModel:
    config = _architecture(role, spec, vocabulary, eos_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class(config).from_config(
            config, dtype=DTYPES[spec.dtype], attn_implementation=attn_implementation
        )
    return fuse_activations(model)
