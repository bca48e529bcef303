"""LoRA students through peft."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltakd.models.image_models import auto_class
from deltakd.models.settings import LoraSpec

log = logging.getLogger(__name__)


def add_lora(model: PreTrainedModel, spec: LoraSpec) -> PeftModel:
    """Wrap the model in an adapter: the adapter is trained, the model's own weights are frozen.

    A quantised model (QLoRA, arXiv 2305.14314) is prepared as peft documents: unquantised weights become float32.

    Raises:
        ValueError: the adapter would be on a layer where it has no effect, or on a tied head or embedding of an
            architecture that can't untie them.
    """
    left_out = unadaptable(model)
    if getattr(model, "is_quantized", False):
        # Gradient checkpointing is enabled elsewhere, in one place for all students.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    modules = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        target_modules=modules,
        exclude_modules=sorted(left_out) if modules == "all-linear" and left_out else None,
        task_type=TaskType.CAUSAL_LM,
        fan_in_fan_out=_is_transposed(model),
    )
    if modules == "all-linear" and left_out:
        log.info("LoRA leaves out %d layers of %s: %s.", len(left_out), type(model).__name__, _reasons(left_out))
    elif refused := {name: why for name, why in left_out.items() if _is_targeted(name, modules)}:
        raise ValueError(
            f"model.lora.target_modules={modules}: an adapter on {len(refused)} layers of {type(model).__name__} would "
            f"not count: {_reasons(refused)}; leave them out, or give all-linear"
        )
    adapted = _wrapped(model, config)
    if adapts_a_tied_layer(model) and not _can_be_untied(model):
        raise ValueError(
            f"model.lora.target_modules={modules}: head and embedding of {type(model).__name__} are one matrix, and it "
            "can't be exported with two, so an adapter on one of them would be lost; leave them out, or give all-linear"
        )
    return adapted


def unadaptable(model: nn.Module) -> dict[str, str]:
    """Return name -> reason for the layers where an adapter would not take effect in both training and export.

    The kernels of state-space layers read some weights directly, bypassing the layer and its adapter. A matrix shared
    by several layers would get each layer's adapter when merged.
    """
    found: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "A_log") and hasattr(module, "D"):
            inner = (n for n, child in module.named_modules() if n and n != "in_proj" and hasattr(child, "weight"))
            found |= {f"{name}.{each}": "state-space kernels read its weight past the adapter" for each in inner}
        if isinstance(module, nn.Linear | Conv1D):
            owners.setdefault(id(module.weight), []).append(name)
    shared = [names for names in owners.values() if len(names) > 1]
    return found | {name: "its matrix is shared by several layers" for names in shared for name in names}


def _is_targeted(name: str, modules: str | Sequence[str]) -> bool:
    """Return True if peft would adapt a layer: a list holds whole names or suffixes, a text is a regular expression."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in modules)


def _reasons(left_out: Mapping[str, str]) -> str:
    kinds: dict[str, set[str]] = {}
    for name, why in left_out.items():
        kinds.setdefault(why, set()).add(name.rsplit(".", 1)[-1])
    return "; ".join(f"{', '.join(sorted(names))} ({why})" for why, names in kinds.items())


def merged(adapted: PeftModel) -> PreTrainedModel:
    """Return a copy of the model with its adapter merged; ``adapted`` is unchanged.

    An adapter on a tied head or embedding changes only that one. The copy and its config are therefore untied.

    Quantised weights would round most of the adapter's small updates away. The adapter of a quantised model is
    therefore merged into the unquantised weights, read again from their source in the dtype of the model's config.

    Raises:
        ValueError: those weights are no longer there.
    """
    base: Any = adapted.get_base_model()
    if not getattr(base, "is_quantized", False):
        # Merging works in place, and the run may still need the adapter.
        return _merge(copy.deepcopy(adapted))
    try:
        fresh = auto_class(base.config).from_pretrained(base.name_or_path, dtype=base.config.dtype)
    except OSError as error:
        raise ValueError(
            f"model.student.path={base.name_or_path} is needed to merge the adapter of a quantised student, but can't "
            f"be read: {str(error).splitlines()[0]}"
        ) from None
    config = copy.copy(adapted.peft_config[adapted.active_adapter])
    assert isinstance(config, LoraConfig)
    config.fan_in_fan_out = _is_transposed(fresh)
    whole = _wrapped(fresh, config)
    set_peft_model_state_dict(whole, get_peft_model_state_dict(adapted, save_embedding_layers=False))
    return _merge(whole)


def merged_state(adapted: PeftModel) -> dict[str, Tensor]:
    """Return the state dict that the model will have once its adapter is merged; weights without one are not copied.

    Args:
        adapted: its own weights must not be quantised, and ``adapts_a_tied_layer`` False.
    """
    model: Any = adapted.get_base_model()
    state = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    for place, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            tuner: Any = layer
            delta = sum(tuner.get_delta_weight(adapter) for adapter in layer.active_adapters)
            weight = layer.get_base_layer().weight
            state[f"{place}.base_layer.weight"] = (weight + delta).to(weight.dtype)
    return {name.replace(".base_layer.", "."): value for name, value in state.items()}


def _wrapped(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        # ``merged`` unties layers with an adapter; the head of a Conv1D model is a Linear, and peft detects that.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True but the target module is")
        # peft has patterns for experts that are one matrix, whether they are adapted or not.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def _merge(adapted: Any) -> PreTrainedModel:
    """Merge the adapter into its model, in place."""
    model = adapted.get_base_model()
    if adapts_a_tied_layer(model):
        head = _plain(model.get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        _say_untied(model.config)
    return adapted.merge_and_unload()


def adapts_a_tied_layer(model: Any) -> bool:
    """Return True if an adapter is on a head or embedding that share their matrix.

    Not if they are a single layer: then its adapter is part of both.
    """
    pair = (model.get_input_embeddings(), model.get_output_embeddings())
    if pair[1] is None or pair[0] is pair[1] or not any(isinstance(layer, BaseTunerLayer) for layer in pair):
        return False
    return _plain(pair[0]).weight is _plain(pair[1]).weight


def _can_be_untied(model: PreTrainedModel) -> bool:
    """Return True if the architecture can have separate head and embedding matrices; nothing is loaded."""
    config = copy.deepcopy(model.config)
    _say_untied(config)
    with torch.device("meta"):
        apart: Any = type(model)(config)
    return apart.get_input_embeddings().weight is not apart.get_output_embeddings().weight


def _say_untied(config: Any) -> None:
    # Multimodal models keep the language model's config inside their own.
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False


def _plain(layer: Any) -> Any:
    """Return the layer itself, without its adapter."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _is_transposed(model: PreTrainedModel) -> bool:
    """Return True if it has Conv1D layers, which store their weight transposed: GPT-2, unless quantised."""
    return any(isinstance(layer, Conv1D) for layer in model.modules())
