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
        target_modules: peft's names of the layers to adapt; ``all-linear`` is every linear layer but the head.
    """

    r: Annotated[int, Ge(1)] = 16
    alpha: float = 32.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: str | Sequence[str] = "all-linear"


def add_lora(model: PreTrainedModel, spec: LoraSpec) -> PeftModel:
    """Wrap the model: its own weights are frozen, the adapter's are trained.

    A quantised model (QLoRA, arXiv 2305.14314) is prepared as peft documents: what is not quantised is made float32.
    """
    if getattr(model, "is_quantized", False):
        # Gradient checkpointing is switched on, or not, for all students in one place.
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
    """A copy of the model with its adapter merged; ``adapted`` stays as it is.

    Adding small numbers to quantised weights would round most of them away: the adapter of a quantised model is merged
    into its weights as they were before, read again from where they came from, in the dtype of the config.

    Raises:
        ValueError: they are no longer there.
    """
    base: Any = adapted.get_base_model()
    if not getattr(base, "is_quantized", False):
        # Merging changes the weights in place, and the run may still go on with the adapter.
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
    """Whether the linear layers are Conv1D, which stores its weight transposed: GPT-2's, unless they are quantised."""
    return any(isinstance(layer, Conv1D) for layer in model.modules())
