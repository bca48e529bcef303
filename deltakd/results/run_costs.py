"""What methods cost: the table of a report, the same columns for runs on the data's and on the student's responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltakd.results.methods import Method

Meta = Mapping[str, Any]


@dataclass(frozen=True)
class CostRow:
    """The average cost of a method's runs; ``cells`` are texts, one for each column of its table."""

    label: str
    runs: int
    cells: list[str]


@dataclass(frozen=True)
class CostTable:
    """The cost of every method with a finished training run.

    Args:
        columns: headings, in addition to the method and its number of runs.
        rows: one for each method.
        notes: what the columns mean, one sentence each.
    """

    columns: list[str]
    rows: list[CostRow]
    notes: list[str]


@dataclass(frozen=True)
class _Column:
    """A heading, a run's value from the ``meta`` of its summary (None: it has none), and decimals."""

    heading: str
    value: Callable[[Meta], float | None]
    digits: int = 0


def _key(name: str) -> Callable[[Meta], float | None]:
    return lambda meta: _number(meta.get(name))


def _written(name: str) -> Callable[[Meta], float | None]:
    """Return how to read a sum over the responses of a run's student: 0 where all responses were the data's."""
    return lambda meta: _number((meta.get("rollouts") or {}).get(name, 0))


def _both(meta: Meta) -> float | None:
    training, writing = _key("training_seconds")(meta), _written("seconds")(meta)
    return None if training is None or writing is None else training + writing


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


_BEFORE = (
    _Column("tokens/s", _key("tokens_per_second")),
    _Column("peak memory (MiB)", _key("peak_memory_mib")),
    _Column("training (s)", _key("training_seconds"), 1),
)
#: Shown where a run's student wrote responses.
_ON_POLICY = (
    _Column("writing (s)", _written("seconds"), 1),
    _Column("both (s)", _both, 1),
    _Column("sampled tokens", _written("tokens")),
)
_AFTER = (
    _Column("last start (s)", _key("seconds"), 1),
    _Column("steps", _key("steps")),
    _Column("trained tokens", _key("valid_tokens")),
)
_NOTE = (
    "Means over a method's finished runs. Trained tokens are the valid ones, those of responses; tokens/s are of "
    "training; memory is of the GPU where there was one, else of the process."
)
_ON_POLICY_NOTE = (
    "Writing is the time that the student took for its own responses, which training leaves out: their sum is what "
    "methods of equal time have in common."
)


def cost_table(methods: Sequence[Method]) -> CostTable:
    """Return the costs; the columns of on-policy runs are there if a run is on-policy."""
    trained = [(method, [run.meta for run in method.finished if not run.evaluation_only]) for method in methods]
    writes = any(meta.get("rollouts") for _, metas in trained for meta in metas)
    columns = [*_BEFORE, *(_ON_POLICY if writes else ()), *_AFTER]
    rows = [
        CostRow(method.label, len(metas), [_mean(metas, column) for column in columns])
        for method, metas in trained
        if metas
    ]
    return CostTable([c.heading for c in columns], rows, [_NOTE, *([_ON_POLICY_NOTE] if writes else [])])


def _mean(metas: Sequence[Meta], column: _Column) -> str:
    values = [value for meta in metas if (value := column.value(meta)) is not None]
    return f"{np.mean(values):,.{column.digits}f}" if values else "–"
