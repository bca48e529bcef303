"""Exporting the student as a Hugging Face model directory, which opens without deltakd."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import accelerate.utils.other
from transformers import PreTrainedTokenizerBase

from deltakd.data.encoding.image_reader import reader_beside
from deltakd.io.files import replacing
from deltakd.models.export_check import ExportCheck
from deltakd.models.image_models import reads_images
from deltakd.models.language_model import LanguageModel
from deltakd.models.lora import merged

log = logging.getLogger(__name__)


def save_weights(model: Any, directory: Path) -> None:
    """Write a transformers model's weights and configuration.

    To check if the model is a DeepSpeed engine, accelerate imports DeepSpeed, which takes seconds and logs a warning.
    This is avoided: unless DeepSpeed is already imported, no model is an engine.

    Args:
        model: a transformers model.
        directory: where they go.
    """
    other = accelerate.utils.other
    available = other.is_deepspeed_available
    if "deepspeed" not in sys.modules:
        other.is_deepspeed_available = lambda: False
    try:
        model.save_pretrained(directory)
    finally:
        other.is_deepspeed_available = available


def save_student(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    card: str,
    check: ExportCheck | None = None,
) -> None:
    """Write weights (safetensors, LoRA merged), configuration, tokenizer and model card, all or nothing.

    Args:
        model: the trained student, left unchanged.
        tokenizer: its tokenizer.
        directory: replaced if it exists.
        card: Markdown text of the model card.
        check: compares the written files with the student before they replace the directory; None: no comparison.

    Raises:
        WriteError: the disk failed.
        ValueError: the written student differs; it is removed.
    """
    causal_lm: Any = model.hf
    if hasattr(causal_lm, "merge_and_unload"):
        causal_lm = merged(causal_lm)
    known = causal_lm.generation_config.eos_token_id
    if not (isinstance(known, list) and tokenizer.eos_token_id in known):
        # Keep a list that contains EOS: chat models need its further end-of-turn tokens.
        causal_lm.generation_config.eos_token_id = tokenizer.eos_token_id
    causal_lm.generation_config.bos_token_id = tokenizer.bos_token_id
    with replacing(directory, "the student") as partial:
        save_weights(causal_lm, partial)
        tokenizer.save_pretrained(partial)
        if reads_images(causal_lm.config):
            reader_beside(tokenizer).save(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if check is not None:
            # A quantised student is exported with its unquantised weights, which give different logits.
            compared = causal_lm if model.quantized else model.hf
            if model.quantized:
                log.info("The export is compared with the adapter merged into the weights before quantising.")
            del causal_lm  # a merged copy is as large as the student, and a third one is about to be opened
            check.check(compared, tokenizer, partial)
