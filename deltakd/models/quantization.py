"""Quantised models, through transformers' own quantisation configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

#: transformers lists bitsandbytes twice; ``load_in_8bit`` or ``load_in_4bit`` says which one.
_BITSANDBYTES = "bitsandbytes"


def quantization_problems(key: str, settings: Any) -> list[str]:
    """Return the problems with a quantisation config; nothing is loaded.

    Args:
        key: its config key, such as ``model.teacher.quantization``.
        settings: the mapping; None: not quantised.
    """
    if settings is None:
        return []
    if not isinstance(settings, Mapping):
        return [f"{key} is {settings!r}; give a mapping: {key}={{quant_method: bitsandbytes, load_in_8bit: true}}"]
    # Imported here, since it imports the model classes, which runs without quantised models need not load for checks.
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

    allowed = sorted({name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING})
    method = settings.get("quant_method")
    if method not in allowed:
        return [f"{key}.quant_method is {method!r}; allowed: {', '.join(allowed)}"]
    if method == _BITSANDBYTES and not (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        return [f"{key}: bitsandbytes needs load_in_8bit: true or load_in_4bit: true"]
    try:
        # transformers says which packages are missing, and what the method can't do on this machine.
        AutoHfQuantizer.from_config(quantization_config(settings), pre_quantized=False).validate_environment(
            device_map=None
        )
    except (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{key}: {' '.join(str(error).split())}"]
    return []


def student_problems(settings: Any, has_adapter: bool) -> list[str]:
    """Return why a student can't be trained with these quantised weights, one sentence each."""
    if settings is None:
        return []
    found = []
    if not has_adapter:
        found.append(
            "model.student.quantization is given, but quantised weights can't be trained; add an adapter with "
            "model/lora=default, or remove it"
        )
    if isinstance(settings, Mapping) and settings.get("load_in_4bit") and not torch.cuda.is_available():
        # After a first pass in eval mode bitsandbytes (0.50.2) uses repacked weights and bypasses autograd.
        found.append(
            "model.student.quantization: on a CPU bitsandbytes gives no gradients through 4-bit weights once the "
            "model has been evaluated; give load_in_8bit: true, or train on a GPU"
        )
    return found


def quantization_config(settings: Mapping[str, Any]) -> Any:
    """Return transformers' config object; unknown options raise transformers' own errors."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(dict(settings))


def weight_bits(settings: Any) -> int | None:
    """Return the approximate bits per weight of a linear layer; None: not quantised, or unknown."""
    given = settings.to_dict() if hasattr(settings, "to_dict") else dict(settings or {})
    if given.get("load_in_8bit"):
        return 8
    if given.get("load_in_4bit"):
        return 4
    for option in ("bits", "nbits", "w_bit", "weights", "quant_type", "quant_method"):
        digits = "".join(c for c in str(given.get(option, "")) if c.isdigit())[:1]
        if digits in ("2", "3", "4", "8"):
            return int(digits)
    return None
