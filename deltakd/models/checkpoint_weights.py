"""The weights of a model as its checkpoint files hold them: names, adapters merged, tied matrices once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from deltakd.models.language_model import LanguageModel
from deltakd.models.lora import adapts_a_tied_layer, merged_state


@torch.no_grad()
def checkpoint_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Return name -> weight, where the model holds them; only weights with an adapter are copies.

    Args:
        model: whole on this process.

    Raises:
        ValueError: it is quantised, or an adapter unties head and embedding: other programs would have to open it as
            another architecture.
    """
    causal_lm: Any = model.causal_lm
    if model.quantized:
        raise ValueError("quantised weights can't be handed over; give no model.student.quantization")
    if adapts_a_tied_layer(causal_lm):
        raise ValueError(
            "an adapter on a tied head or embedding unties them, which the server's model is not; give "
            "model.lora.target_modules=all-linear"
        )
    hf: Any = model.hf
    state = merged_state(hf) if hasattr(hf, "peft_config") else causal_lm.state_dict()
    state = remove_tied_weights_from_state_dict(dict(state), causal_lm)
    return revert_weight_conversion(causal_lm, state)
