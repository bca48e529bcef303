"""Language models as (body, head): loading, tokenizers, adapters, quantisation and export.

Config checks need only the names here; ``lora`` and ``saving`` import peft and accelerate, so import them by name.
"""

from deltakd.models.export_check import ExportCheck
from deltakd.models.language_model import LanguageModel, transformer_blocks
from deltakd.models.loading import load_config, load_model, load_skeleton, spec_problems
from deltakd.models.settings import LoraSpec, ModelSettings, ModelSpec
from deltakd.models.tokenizers import common_vocabulary, load_tokenizer, train_tokenizer

__all__ = [
    "ExportCheck",
    "LanguageModel",
    "LoraSpec",
    "ModelSettings",
    "ModelSpec",
    "common_vocabulary",
    "load_config",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "spec_problems",
    "train_tokenizer",
    "transformer_blocks",
]
