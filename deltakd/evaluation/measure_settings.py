"""What ``evaluation.measures`` says: how much is measured beyond ROUGE, and with which models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class MeasureSettings:
    """How teacher-forced measures are made.

    Args:
        rows: first so many rows of the validation data and of each evaluation set; None: all; 0: nothing is measured.
        references: ``auto``: from the cache of references, and from the models that the config gives a path for,
            whether the loss reads them or not; ``none``: no other model than the student.
    """

    rows: int | None = 256
    references: str = AUTO

    def problems(self) -> list[str]:
        """What is wrong with ``evaluation.measures``, one sentence each."""
        found = []
        if self.rows is not None and (isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 0):
            found.append(
                f"evaluation.measures.rows is {self.rows!r}; give a number of rows, null for all, or 0 for none"
            )
        if self.references not in (AUTO, NONE):
            found.append(f"evaluation.measures.references is {self.references!r}; allowed: {AUTO}, {NONE}")
        return found


def make_measure_settings(node: Mapping[str, Any] | None, problems: list[str]) -> MeasureSettings:
    """The settings of a config, of a run from before there were any the default ones; problems go to the list."""
    known = {field.name for field in fields(MeasureSettings)}
    given = dict(node or {})
    problems += [
        f"evaluation.measures has no key {key!r}; allowed: {', '.join(sorted(known))}" for key in set(given) - known
    ]
    settings = MeasureSettings(**{key: value for key, value in given.items() if key in known})
    problems += settings.problems()
    return settings
