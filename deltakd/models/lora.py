"""LoRA students through peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA adapter (arXiv 2106.09685).

    Args:
        r: rank.
        alpha: the adapter is scaled by alpha / r.
        dropout: on the adapter's input.
        target_modules: peft's names of the layers to adapt; ``all-linear`` is every linear layer but the head.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"

    def problems(self) -> list[str]:
        """What is wrong with ``model.lora``, one sentence each."""
        found = []
        if self.r < 1:
            found.append(f"model.lora.r is {self.r}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            found.append(f"model.lora.dropout is {self.dropout}; it must be in [0, 1)")
        return found


def add_lora(model: PreTrainedModel, spec: LoraSpec) -> PeftModel:
    """Wrap the model: its own weights are frozen, the adapter's are trained."""
    modules = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        target_modules=modules,
        task_type=TaskType.CAUSAL_LM,
        # GPT-2's linear layers are Conv1D, stored transposed.
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted
