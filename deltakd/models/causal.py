"""True causal language models: each position predicts the next token and sees no later ones."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from deltakd.models.image_models import IMAGE_FAMILIES


class NotCausalError(ValueError):
    """A model that can neither be trained to predict the next token nor serve as a reference."""


def check_causal(key: str, config: PretrainedConfig) -> None:
    """Raise a NotCausalError, with the remedy, if the configuration describes another kind of model.

    transformers also gives encoders such as BERT a causal head, but they see the tokens that they predict unless the
    configuration makes them decoders.

    Args:
        key: names the model to the user, such as ``model.student.path=bert-base-uncased``.
        config: its configuration.
    """
    kind = _other_kind(config)
    if kind is None:
        return
    named = getattr(config, "architectures", None) or []
    architectures = f", architectures {', '.join(named)}" if named else ""
    raise NotCausalError(
        f"{key} is not a causal language model: its configuration (model_type {config.model_type}{architectures}) is "
        f"that of {kind}; give a decoder, such as one of the families GPT-2, OPT, Llama, Qwen, Gemma or Mistral"
    )


def _other_kind(config: PretrainedConfig) -> str | None:
    """Return a description of the model; None for a causal language model."""
    if config.is_encoder_decoder:
        return "an encoder-decoder, whose decoder attends to a separate prompt"
    # Code that comes with the model.
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None
    kind = config.model_type
    if kind in IMAGE_FAMILIES:
        return None
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"an image model of a family that is not known here (known: {', '.join(sorted(IMAGE_FAMILIES))})"
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        return "an encoder, which sees the tokens after each position" if encoder else "a model without a causal head"
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
        return "an encoder, which sees the tokens after each position (is_decoder is not set)"
    return None
