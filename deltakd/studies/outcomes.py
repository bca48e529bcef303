"""Results of the runs of a search or a multirun: the best one, and a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from deltakd.io.files import replacing

FINISHED, ENDED_EARLY, FAILED, UNFINISHED = "finished", "ended early", "failed", "unfinished"

#: Keys whose values are repetitions of one setting.
_REPETITION = "seed"


@dataclass(frozen=True)
class Outcome:
    """The result of one run.

    Args:
        number: number of the trial or job.
        settings: key -> value of the overrides that differ among the runs.
        state: finished, ended early, failed or unfinished.
        objective: name of the metric.
        value: value of the objective, or None.
        seconds: its duration, since its last start if it was interrupted; None if unknown.
        directory: the run directory.
    """

    number: int
    settings: dict[str, str]
    state: str
    objective: str
    value: float | None
    seconds: float | None
    directory: Path


@dataclass(frozen=True)
class Best:
    """The best setting.

    Args:
        settings: key -> value; without the seed if a setting was run under several.
        value: mean of the objective over seeds.
        stderr: standard error over seeds; None for a single seed.
        seeds: number of runs behind it.
        directory: directory of the run, or of the best of its seeds.
    """

    settings: dict[str, str]
    value: float
    stderr: float | None
    seeds: int
    directory: Path

    def __str__(self) -> str:
        spread = "" if self.stderr is None else f" ± {self.stderr:.2g} (standard error over {self.seeds} seeds)"
        return f"{self.value:.6g}{spread}"

    @property
    def overrides(self) -> list[str]:
        """The settings as Hydra overrides."""
        return [f"{key}={value}" for key, value in self.settings.items()]


def in_short(settings: dict[str, str]) -> str:
    """Return settings as a readable line: long numbers are cut to 4 digits."""
    return " ".join(f"{key}={_short(value)}" for key, value in settings.items())


def _short(text: str) -> str:
    number = as_number(text)
    return text if number is None or len(text) <= 6 else f"{number:.4g}"


def find_best(outcomes: Sequence[Outcome], maximize: bool) -> Best | None:
    """Return the best finished setting; runs that differ only in their seed count as one, with their mean.

    Only the settings with the most runs are compared: otherwise one lucky seed would beat a mean.
    """
    groups: dict[tuple[tuple[str, str], ...], list[tuple[float, Outcome]]] = {}
    for outcome in outcomes:
        if outcome.state == FINISHED and outcome.value is not None and math.isfinite(outcome.value):
            setting = tuple((key, value) for key, value in outcome.settings.items() if key != _REPETITION)
            groups.setdefault(setting, []).append((outcome.value, outcome))
    if not groups:
        return None
    most = max(map(len, groups.values()))
    sign = 1 if maximize else -1
    runs = max((g for g in groups.values() if len(g) == most), key=lambda g: sign * mean(value for value, _ in g))
    values = [value for value, _ in runs]
    _, best_run = max(runs, key=lambda run: sign * run[0])
    settings = {key: value for key, value in best_run.settings.items() if most == 1 or key != _REPETITION}
    stderr = stdev(values) / math.sqrt(most) if most > 1 else None
    return Best(settings, mean(values), stderr, most, best_run.directory)


def write_table(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write one row per run: number, state, settings, objective, value, seconds, directory."""
    keys = keys_of(outcomes)
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "state", *keys, "objective", "value", "seconds", "directory"])
        for o in outcomes:
            settings = [o.settings.get(key, "") for key in keys]
            value = "" if o.value is None else repr(o.value)
            seconds = "" if o.seconds is None else f"{o.seconds:.1f}"
            writer.writerow([o.number, o.state, *settings, o.objective, value, seconds, o.directory])


def incomparable(objective: str, keys: Sequence[str]) -> str | None:
    """Return why values of the objective can't be compared, or None: each loss has its own ``val/loss``.

    Args:
        objective: name of the metric.
        keys: of the overrides that differ among the runs.
    """
    guilty = [key for key in keys if key in ("loss", "delta_weight") or key.startswith("loss.")]
    if objective not in ("val/loss", "train/loss") or not guilty:
        return None
    return (
        f"{objective} is another quantity under each {', '.join(guilty)}, so the runs can't be compared by it; "
        "give objective=val/ce, or a score of answers such as val/rougeL"
    )


def keys_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the keys of all settings, each once."""
    return list(dict.fromkeys(key for o in outcomes for key in o.settings))


def as_number(text: str) -> float | None:
    """Return a setting's value as a number; None if it is a name."""
    try:
        return float(text)
    except ValueError:
        return None
