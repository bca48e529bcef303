"""Models that read images beside text: which families, and which class of transformers opens a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

#: Families (``model_type``) whose training, references and answers are tested with images.
IMAGE_FAMILIES = frozenset({"idefics3", "llava_onevision", "qwen2_5_vl", "qwen2_vl", "smolvlm"})


def auto_class(config: Any) -> Any:
    """Return the auto class of transformers that opens a model, or builds it from its configuration."""
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def reads_images(config: Any) -> bool:
    """Return True for a model of one of the ``IMAGE_FAMILIES``."""
    return config.model_type in IMAGE_FAMILIES


def feature_differences(config: Any, processor: Mapping[str, Any]) -> list[tuple[str, object, object]]:
    """Return (key of the processor, its value, the model's) where an image gets other tokens than a model has features.

    Args:
        config: of a model that reads images.
        processor: settings of a transformers processor.
    """
    vision = config.vision_config
    if config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        processor = processor.get("image_processor") or {}
        wanted = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    else:
        features = (vision.image_size // vision.patch_size) ** 2
        if config.model_type == "llava_onevision":
            wanted = {"num_image_tokens": features}
        else:
            wanted = {"image_seq_len": features // config.scale_factor**2}
    return [(key, processor[key], value) for key, value in wanted.items() if processor.get(key) not in (None, value)]
