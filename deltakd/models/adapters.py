"""A tuned teacher as an adapter on its raw teacher: one set of weights, read with the adapter on and off."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from deltakd.io.files import replacing
from deltakd.models.adapter_files import BASE_FILE
from deltakd.models.identity import model_version
from deltakd.models.settings import ModelSpec


def load_adapters(model: PreTrainedModel, adapters: Mapping[str, str]) -> PeftModel:
    """Put adapters on a model; all are frozen, and the first is switched on.

    Args:
        model: the base, changed in place.
        adapters: role -> directory; at least one.

    Raises:
        ValueError: an adapter does not fit the model.
    """
    adapted: PeftModel | None = None
    for role, directory in adapters.items():
        key = f"model.{role}.adapter={directory}"
        remedy = "give the adapter that was trained on this model"
        try:
            with warnings.catch_warnings():
                # Here it is an error, raised below.
                warnings.filterwarnings("ignore", message="Found missing adapter keys")
                if adapted is None:
                    adapted = PeftModel.from_pretrained(model, directory, adapter_name=role, torch_device="cpu")
                # The first one's weights are read again: only this call says which are absent.
                loaded = adapted.load_adapter(directory, adapter_name=role, torch_device="cpu")
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{key} does not fit {type(model).__name__} ({reason}); {remedy}") from None
        unfit = sorted([*loaded.missing_keys, *loaded.unexpected_keys])
        if unfit:
            raise ValueError(
                f"{key} does not fit {type(model).__name__}: {len(unfit)} of its weights are absent or have no layer "
                f"(first: {unfit[0]}); {remedy}"
            )
    assert adapted is not None, "no adapters"
    adapted.requires_grad_(False)
    return adapted


def save_adapter(adapted: Any, directory: Path, base: ModelSpec) -> None:
    """Write a trained adapter, all or nothing, with a record of its base model.

    Args:
        adapted: the trained PEFT model.
        directory: replaced if it exists.
        base: where the model without its adapter came from.

    Raises:
        WriteError: the disk failed.
    """
    record = {"path": base.path, "version": None if base.path is None else model_version(base.path)}
    with replacing(directory, "the adapter") as partial:
        adapted.save_pretrained(str(partial), save_embedding_layers=False)
        (partial / BASE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
