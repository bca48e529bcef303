"""Mixtures of experts: the part of their own training objective that balances the experts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts")
#: What transformers calls the loss in each architecture that has it (equations 4 to 6 of arXiv 2101.03961).
_LOSS = "load_balancing_loss_func"
_WEIGHTS = ("router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef", "router_z_loss_coef")


def router_loss_problem(model: PreTrainedModel) -> str | None:
    """Return why a student's experts can't be balanced (``model.router_aux_loss_coef``); None: they can."""
    body: Any = model.base_model
    records = "router_logits" in (getattr(body, "_can_record_outputs", None) or {})
    if records and _loss_of(model) is not None and _chosen_of(model.config) is not None:
        return None
    kind = type(model).__name__
    what = "balances its experts by another way" if _experts_of(model.config) > 1 else "has no experts to balance"
    return f"model.router_aux_loss_coef is given, but {kind} {what}; leave it out"


def router_loss(model: PreTrainedModel, logits: Sequence[Tensor], attention_mask_BT: Tensor | None) -> Tensor:
    """Return the load-balancing loss of a micro-batch, a scalar: K if its K experts a token are used evenly.

    Args:
        model: without ``router_loss_problem``.
        logits: [positions, experts] of each layer.
        attention_mask_BT: 1 on real tokens; None: all are.
    """
    loss: Any = _loss_of(model)
    value: Tensor = loss(tuple(logits), logits[0].shape[-1], _chosen_of(model.config), attention_mask_BT)
    return value


def _loss_of(model: PreTrainedModel) -> Any:
    return getattr(sys.modules[type(model).__module__], _LOSS, None)


def _chosen_of(config: Any) -> int | None:
    text = config.get_text_config(decoder=True)
    return next((n for name in _CHOSEN if isinstance(n := getattr(text, name, None), int)), None)


def _experts_of(config: Any) -> int:
    text = config.get_text_config(decoder=True)
    return max((n for name in _COUNTS if isinstance(n := getattr(text, name, None), int)), default=0)


def balance_warning(config: Any) -> str | None:
    """Return a sentence on the untrained load balancing of a student's experts; None for a dense model.

    Unless the user asks for it (``router_loss``), only their own loss is trained.

    Args:
        config: the student's transformers config.
    """
    text = config.get_text_config(decoder=True)
    experts = _experts_of(config)
    if experts < 2:
        return None
    weights = {name: value for name in _WEIGHTS if (value := getattr(text, name, None))}
    own = f" ({', '.join(f'{name}={value:g}' for name, value in weights.items())})" if weights else ""
    return (
        f"the student is a mixture of {experts} experts, and what balances them in its own training, an auxiliary loss"
        f"{own} or a bias that follows the load, is not trained here: watch whether its experts stay in use, "
        "or give model.router_aux_loss_coef"
    )
