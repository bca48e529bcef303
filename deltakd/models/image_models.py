"""Models that read images beside text: which families, and which class of transformers opens a model."""

from __future__ import annotations

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
