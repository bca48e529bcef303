"""Models with a recurrent state: checks that padding does not enter it, and that a step from the state is correct.

Attention masks padding out. State-space, convolutional and linear-attention layers must do so explicitly, and some
architectures do not: their padded batches would train, score and answer differently from the rows alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltakd.generation.full_batch import DecodingState, Row
from deltakd.generation.model_step import Step, evaluating, position_limit
from deltakd.models.language_model import LanguageModel
from deltakd.types import device_of, dtype_of

#: Tokens of the two rows that are run alone and together.
_LENGTHS = (3, 7)


@torch.no_grad()
def check_recurrence(role: str, model: LanguageModel) -> None:
    """Run two rows alone, in one batch padded on the right, and by the generation engine, padded on the left.

    Pure attention models are skipped.

    Raises:
        ValueError: padding changes a row's logits, or a step from the state differs from the whole row.
    """
    limit = position_limit(model.causal_lm)
    if not model.keeps_a_state or (limit is not None and limit <= max(_LENGTHS)):
        return
    name = type(model.causal_lm).__name__
    with evaluating(model):
        rows = [[(5 * i + n) % model.vocabulary for i in range(1, 1 + n)] for n in _LENGTHS]
        alone = [_alone(model, row)[-1] for row in rows]
        if not _close(model, _padded_right(model, rows), alone):
            raise ValueError(f"model.{role}: padding on the right changes what {name} computes for a row; {_REMEDY}")
        try:
            first, second, continued = _generated(model, rows)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"model.{role}: {name} can't be run token by token ({reason}); {_REMEDY}") from None
        if not _close(model, first, alone):
            raise ValueError(
                f"model.{role}: padding on the left, with which answers are generated, changes what {name} computes "
                f"for a row; {_REMEDY}"
            )
        if not _close(model, second, [_alone(model, row)[-1] for row in continued]):
            raise ValueError(
                f"model.{role}: a step of {name} from its cached state differs from running the whole row; {_REMEDY}"
            )


_REMEDY = "use another architecture (Mamba, Mamba2, Jamba, Zamba2, Bamba, Falcon-H1 and those of attention are fine)"


def _alone(model: LanguageModel, row: list[int]) -> Tensor:
    """Return [T, V], the logits of a row run alone."""
    ids_BT = torch.tensor([row], device=device_of(model))
    return model.head_of(model.hidden_states(ids_BT, torch.ones_like(ids_BT))[0]).logits()


def _padded_right(model: LanguageModel, rows: list[list[int]]) -> list[Tensor]:
    """Return the last logits of each row, [V], from one batch."""
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [1] * (width - len(row)) for row in rows], device=device_of(model))
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device_of(model))
    hidden_BTD = model.hidden_states(ids_BT, mask_BT)
    return [model.head_of(hidden_BTD[i, len(row) - 1 : len(row)]).logits()[0] for i, row in enumerate(rows)]


def _generated(model: LanguageModel, rows: list[list[int]]) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Return the logits of two steps, [B, V] each, and the rows as they are at the second."""
    step = Step(model.causal_lm, lambda _, logits_BV: logits_BV, model.vocabulary)
    state = DecodingState.of([Row(i, row, 4, None) for i, row in enumerate(rows)], 1, device_of(model))
    first_BV = step(state)
    chosen_B = first_BV.argmax(-1)
    state.take(chosen_B, frozenset())
    continued = [[*row, token] for row, token in zip(rows, chosen_B.tolist(), strict=True)]
    return first_BV, step(state), continued


def _close(model: LanguageModel, given: Any, expected: list[Tensor]) -> bool:
    """Return True if logits are equal up to the order of sums; a wrong state is off by far more."""
    tolerance = 1e-3 if dtype_of(model) in (torch.float32, torch.float64) else 0.1
    scale = max(1.0, max(z_V.abs().max().item() for z_V in expected))
    return all(
        bool((ours_V.float() - z_V.float()).abs().max() <= tolerance * scale)
        for ours_V, z_V in zip(given, expected, strict=True)
    )
