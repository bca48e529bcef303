"""Language models as (body, head): loading, tokenizers, adapters, quantisation and export."""

from deltakd.models.export_check import ExportCheck
from deltakd.models.language_model import LanguageModel, transformer_blocks
from deltakd.models.loading import load_config, load_model, load_skeleton, spec_problems
from deltakd.models.lora import LoraSpec, add_lora
from deltakd.models.saving import save_student
from deltakd.models.settings import ModelSettings, ModelSpec
from deltakd.models.tokenizers import common_vocabulary, load_tokenizer, train_tokenizer

__all__ = [
    "ExportCheck",
    "LanguageModel",
    "LoraSpec",
    "ModelSettings",
    "ModelSpec",
    "add_lora",
    "common_vocabulary",
    "load_config",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "save_student",
    "spec_problems",
    "train_tokenizer",
    "transformer_blocks",
]
