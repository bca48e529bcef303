"""Mixtures of experts: the parts of their own training objective that distillation leaves out."""

from __future__ import annotations

from typing import Any

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_WEIGHTS = ("router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef", "router_z_loss_coef")


def balance_warning(config: Any) -> str | None:
    """Return a sentence on the untrained load balancing of a student's experts; None for a dense model.

    Only the user's loss is used: no auxiliary loss is added to the student's or computed for references.

    Args:
        config: the student's transformers config.
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
