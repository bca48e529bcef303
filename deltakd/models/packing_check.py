"""Whether a model runs rows that lie end to end as it runs them alone."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from deltakd.generation.model_step import evaluating, position_limit
from deltakd.models.language_model import LanguageModel
from deltakd.types import PackedRows, device_of

#: Tokens of the rows that are run alone and together.
_LENGTHS = (5, 3, 8, 1)
_REMEDY = "give data.packing=false"


@torch.no_grad()
def check_packing(role: str, model: LanguageModel) -> None:
    """Run a few rows alone and end to end.

    Raises:
        ValueError: the model can't run packed rows, or computes something else for them.
    """
    name = type(model.causal_lm).__name__
    if model.keeps_a_state:
        raise ValueError(
            f"data.packing=true, but {name} (model.{role}) keeps a state, which a row would hand on to the next one; "
            + _REMEDY
        )
    if "position_ids" not in inspect.signature(model.causal_lm.base_model.forward).parameters:
        raise ValueError(f"data.packing=true, but {name} (model.{role}) takes no position ids; {_REMEDY}")
    limit = position_limit(model.causal_lm) or max(_LENGTHS)
    rows = [[(5 * i + n) % model.vocabulary for i in range(1, 1 + min(n, limit))] for n in _LENGTHS]
    device = device_of(model)
    with evaluating(model):
        alone = [model.hidden_states(ids[None], torch.ones_like(ids[None]))[0] for ids in _tensors(rows, device)]
        together = model.packed_hidden_states(_end_to_end(rows, device))[0]
        if not _close(together, torch.cat(alone)):
            raise ValueError(
                f"data.packing=true, but {name} (model.{role}) computes something else for rows laid end to end than "
                f"for each alone; {_REMEDY}"
            )


def _tensors(rows: list[list[int]], device: torch.device) -> list[Tensor]:
    return [torch.tensor(row, device=device) for row in rows]


def _end_to_end(rows: list[list[int]], device: torch.device) -> PackedRows:
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[place for row in rows for place in range(len(row))]])
    starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    return PackedRows(ids, positions, torch.empty(0, dtype=torch.int64), starts, max(map(len, rows))).to(device)


def _close(given: Tensor, expected: Tensor) -> bool:
    """Return True if hidden states are equal up to the order of sums; another row's tokens change them by far more."""
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
    return bool((given - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1.0))
