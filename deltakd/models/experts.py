"""Mixtures of experts: what of their own training objective distillation does not train."""

from __future__ import annotations

from typing import Any

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_WEIGHTS = ("router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef", "router_z_loss_coef")


def balance_warning(config: Any) -> str | None:
    """Return a sentence on what keeps a student's experts evenly used and is not trained; None for a dense model.

    Losses here are the user's alone: an auxiliary loss is neither added to the student's nor computed of references.

    Args:
        config: of the student, as transformers has it.
    """
    text = config.get_text_config(decoder=True)
    experts = max((n for name in _COUNTS if isinstance(n := getattr(text, name, None), int)), default=0)
    if experts < 2:
        return None
    weights = {name: value for name in _WEIGHTS if (value := getattr(text, name, None))}
    own = f" ({', '.join(f'{name}={value:g}' for name, value in weights.items())})" if weights else ""
    return (
        f"the student is a mixture of {experts} experts, and what balances them in its own training, an auxiliary loss"
        f"{own} or a bias that follows the load, is not trained here: watch whether its experts stay in use"
    )
