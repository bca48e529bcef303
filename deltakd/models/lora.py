"""LoRA students through peft."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Lt
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA adapter (arXiv 2106.09685).

    Args:
        r: rank.
        alpha: the adapter is scaled by alpha / r.
        dropout: on the adapter's input.
        target_modules: peft's names of the layers to adapt; ``all-linear``: every linear layer except the head.
    """

    r: Annotated[int, Ge(1)] = 16
    alpha: float = 32.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: str | Sequence[str] = "all-linear"


def add_lora(model: PreTrainedModel, spec: LoraSpec) -> PeftModel:
    """Wrap the model in an adapter: the adapter is trained, the model's own weights are frozen.

    A quantised model (QLoRA, arXiv 2305.14314) is prepared as peft documents: unquantised weights become float32.
    """
    if getattr(model, "is_quantized", False):
        # Gradient checkpointing is switched on elsewhere, in one place for all students.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    modules = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        target_modules=modules,
        task_type=TaskType.CAUSAL_LM,
        fan_in_fan_out=_is_transposed(model),
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def merged(adapted: PeftModel) -> PreTrainedModel:
    """Return a copy of the model with its adapter merged; ``adapted`` is unchanged.

    Quantised weights would round most of the adapter's small updates away. The adapter of a quantised model is
    therefore merged into the unquantised weights, read again from their source in the dtype of the model's config.

    Raises:
        ValueError: those weights are no longer there.
    """
    base: Any = adapted.get_base_model()
    if not getattr(base, "is_quantized", False):
        # Merging works in place, and the run may still need the adapter.
        return copy.deepcopy(adapted).merge_and_unload()  # type: ignore[operator]
    try:
        fresh = AutoModelForCausalLM.from_pretrained(base.name_or_path, dtype=base.config.dtype)
    except OSError as error:
        raise ValueError(
            f"model.student.path={base.name_or_path} is needed to merge the adapter of a quantised student, but can't "
            f"be read: {str(error).splitlines()[0]}"
        ) from None
    config = copy.copy(adapted.peft_config[adapted.active_adapter])
    assert isinstance(config, LoraConfig)
    config.fan_in_fan_out = _is_transposed(fresh)
    whole = get_peft_model(fresh, config)
    set_peft_model_state_dict(whole, get_peft_model_state_dict(adapted))
    return whole.merge_and_unload()  # type: ignore[operator,return-value]


def _is_transposed(model: PreTrainedModel) -> bool:
    """True if it has Conv1D layers, which store their weight transposed: GPT-2, unless quantised."""
    return any(isinstance(layer, Conv1D) for layer in model.modules())
