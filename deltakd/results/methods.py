"""Groups runs that differ only in their seed into methods; models that others learnt from are listed separately."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltakd.config.loss_names import KnownLosses, delta_weight_keys, flat, loss_name
from deltakd.results.reading import Run, job_label
from deltakd.training.settings import NOT_THE_METHOD

#: Maximum characters of a setting in a label, and maximum settings per label; longer ones are only in the legend.
_SETTING, _SETTINGS = 18, 2


@dataclass(frozen=True)
class Method:
    """Runs that differ only in their training seed.

    Args:
        label: unique among the methods of a comparison.
        runs: by ascending seed.
        role: ``teacher``, ``raw teacher`` or ``raw student`` if other given runs learnt from it, else None.
        loss: the loss's name in ``conf/loss``.
        delta_weight: the weight that its loss uses; None if it uses none, or a scheduled one.
        family: key shared by methods that differ only in the delta weight.
        at_zero: key shared by a Delta-KD and its equivalent plain distillation at weight 0; None for all other
            methods.
        settings: key -> value in which it differs from the other methods of its loss; the label may leave them out.
    """

    label: str
    runs: list[Run] = field(hash=False)
    role: str | None = None
    loss: str = ""
    delta_weight: float | None = None
    family: str = ""
    at_zero: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def shown_role(self) -> str | None:
        """The role; None if the label already says it."""
        said = set(re.findall(r"\w+", self.label.lower()))
        return None if self.role is None or set(self.role.split()) <= said else self.role

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def seeds(self) -> list[int]:
        """Training seeds of the finished runs."""
        return [run.seed for run in self.finished]

    @property
    def parameters(self) -> int | None:
        """The student's parameter count; None if no finished run records it."""
        counts = [(run.meta.get("parameters") or {}).get("student") for run in self.finished]
        return next((int(count) for count in counts if count), None)

    def evaluated(self, name: str) -> list[Run]:
        """Return the finished runs that have answers to the set ``name``."""
        return [run for run in self.finished if name in run.answers]

    def scores(self, name: str, metric: str) -> NDArray[np.float64]:
        """Return scores [S, R] in per cent by training seed and row of ``row_ids``, averaged over sampling seeds."""
        return np.array([_row_means(run, name, metric) for run in self.evaluated(name)], dtype=np.float64)

    def sampling_std(self, name: str, metric: str) -> float | None:
        """Return the std of the sampling seeds' means in per cent, averaged over runs; None for a single seed."""
        means = [
            [np.mean([record[metric] for record in records]) for records in run.answers[name].values()]
            for run in self.evaluated(name)
        ]
        if min(map(len, means), default=0) < 2:
            return None
        return float(np.mean([np.std(of, ddof=1) for of in means]))

    def row_ids(self, name: str) -> list[int]:
        """Return the row ids of the set ``name``, ascending; read from the first run, as all runs share a protocol."""
        return row_ids(self.evaluated(name)[0], name)


def row_ids(run: Run, name: str) -> list[int]:
    """Return the row ids of a set that a run answered, ascending."""
    return sorted({record["row_id"] for record in next(iter(run.answers[name].values()))})


def _row_means(run: Run, name: str, metric: str) -> NDArray[np.float64]:
    by_seed = [{record["row_id"]: record[metric] for record in records} for records in run.answers[name].values()]
    return np.array([[scores[row] for row in row_ids(run, name)] for scores in by_seed], dtype=np.float64).mean(axis=0)


def make_methods(runs: Sequence[Run], known: KnownLosses, notes: list[str]) -> list[Method]:
    """Group runs into methods, references first, otherwise in the order of their first runs.

    Args:
        runs: in the order found.
        known: see ``read_losses``.
        notes: gets one sentence for each run left out because another has the same config and seed.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        group = groups.setdefault(_identity(run), [])
        twin = next((other for other in group if other.seed == run.seed), None)
        if twin is None:
            group.append(run)
        elif run.finished and not twin.finished:
            group[group.index(twin)] = run
            notes.append(
                f"{twin.path} is not finished, and {run.path} is the same run finished: the former is left out."
            )
        else:
            notes.append(f"{run.path} repeats {twin.path} (same config, same seed): it is left out.")
    members = [sorted(group, key=lambda run: run.seed) for group in groups.values()]
    losses = [
        "" if group[0].evaluation_only else loss_name(group[0].config.get("loss") or {}, known) for group in members
    ]
    roles = [_role(group, runs) for group in members]
    differing = [_differing(i, members, losses, roles) for i in range(len(members))]
    labels = _unique([_label(*of) for of in zip(members, losses, differing, strict=True)])
    weighted = [
        frozenset() if group[0].evaluation_only else delta_weight_keys(group[0].config.get("loss") or {}, known)
        for group in members
    ]
    weights = [_delta_weight(group[0], keys) for group, keys in zip(members, weighted, strict=True)]
    families = [_family(group[0], keys) for group, keys in zip(members, weighted, strict=True)]
    at_zero = [_at_zero(group[0]) for group in members]
    parts = zip(labels, members, roles, losses, weights, families, at_zero, differing, strict=True)
    methods = [Method(*of) for of in parts]
    return [m for m in methods if m.role] + [m for m in methods if not m.role]


def _identity(run: Run) -> tuple[Any, ...]:
    if run.evaluation_only:
        return ("evaluated", run.config["evaluated_model"], run.config.get("evaluated_model_sha256"))
    return tuple(sorted((key, repr(value)) for key, value in method_settings(run).items()))


def method_settings(run: Run) -> dict[str, Any]:
    """Return dotted key -> value of all settings that make a method, so without seed, paths of outputs and the like."""
    settings = {key: value for key, value in flat(run.config).items() if not _is_below(key, NOT_THE_METHOD)}
    return settings | {"references": "topk" if _approximate_references(run) else "exact"}


def _approximate_references(run: Run) -> bool:
    """True if the run learnt from a cache of top-K log-probs; all other references are exact and equivalent."""
    reference = run.config.get("reference") or {}
    summary = Path(str(reference.get("path"))) / "summary.json"
    if reference.get("store") or not summary.is_file():
        return bool(reference.get("store") == "topk")
    # The config may omit ``store``; the cache then says it.
    try:
        return bool(json.loads(summary.read_text(encoding="utf-8")).get("store") == "topk")
    except (ValueError, AttributeError):
        return False


def _is_below(key: str, parents: Sequence[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _role(group: Sequence[Run], runs: Sequence[Run]) -> str | None:
    """Return the group's role for other runs; being the initial student counts only if the data differ."""
    students = {os.path.realpath(run.path / "student") for run in group}
    for role, called in (("teacher", "teacher"), ("teacher_raw", "raw teacher"), ("student", "raw student")):
        for run in runs:
            settings = (run.config.get("model") or {}).get(role)
            source = settings.get("path") if isinstance(settings, Mapping) else None
            if source is None or run in group or os.path.realpath(str(source)) not in students:
                continue
            if role != "student" or _data(run) != _data(group[0]):
                return called
    return None


def _data(run: Run) -> Any:
    data = run.config.get("data") or {}
    return data.get("_target_"), data.get("train")


def _delta_weight(run: Run, keys: frozenset[str]) -> float | None:
    weight = run.config.get("delta_weight")
    return float(weight) if keys and isinstance(weight, int | float) else None


def _family(run: Run, keys: frozenset[str]) -> str:
    """Return all settings except the delta weight, which the loss has at ``keys``."""
    weights = {f"loss.{key}" for key in keys}
    return repr(sorted((key, repr(value)) for key, value in method_settings(run).items() if key not in weights))


def _at_zero(run: Run) -> str | None:
    """Return all settings except the target, if that is the teacher with or without the paper's shift; else None."""
    settings = method_settings(run)
    if str(settings.get("loss.target._target_")).rpartition(".")[2] not in ("teacher_target", "delta_target"):
        return None
    # Plain distillation reads no raw teacher, so its config need not name one.
    kept = {k: v for k, v in settings.items() if not _is_below(k, ("loss.target", "model.teacher_raw"))}
    return repr(sorted((key, repr(value)) for key, value in kept.items()))


def _label(group: Sequence[Run], loss: str, differing: Mapping[str, str]) -> str:
    """Return a short name: the study's, or the loss with the settings that fit; the legend has all of them."""
    named = _stage_name(group)
    if named:
        return named
    if group[0].evaluation_only:
        model = Path(str(group[0].config["evaluated_model"]))
        return f"{model.parent.name if model.name == 'student' else model.name} (evaluated)"
    kept = differing if len(differing) <= _SETTINGS else {k: v for k, v in differing.items() if k == "delta_weight"}
    shown = [f"{_last(key)}={value}" for key, value in kept.items()]
    return " ".join([loss, *(text for text in shown if len(text) <= _SETTING)])


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _stage_name(group: Sequence[Run]) -> str | None:
    """Return the study's name for it; for several seeds, the common prefix of their names."""
    names = [run.label or _job_label(run) or "" for run in group]
    if len(set(names)) == 1:
        return names[0] or None
    common = names[0]
    while not all(name.startswith(common) for name in names):
        common = common[:-1]
    return re.sub(r"[ _-]*(seed|s)?[ _-]*$", "", common) or None


def _job_label(run: Run) -> str | None:
    """Return a label from the run's name in a study; None for other names."""
    stage = stage_of(run)
    return None if stage is None else job_label(stage, str(run.config["name"]).partition("/")[2])


def stage_of(run: Run) -> str | None:
    """Return the stage of a run called ``<study>/<stage>`` or ``<study>/<stage>/<what varies>``; None for others."""
    _, _, name = str(run.config.get("name") or "").partition("/")
    stage = name.partition("/")[0]
    return stage if name and Path(name).name == run.path.name and not run.evaluation_only else None


def _differing(
    index: int, members: Sequence[list[Run]], losses: Sequence[str], roles: Sequence[str | None]
) -> dict[str, str]:
    """Return key -> value for every setting in which the methods of one loss differ."""
    run = members[index][0]
    if run.evaluation_only:
        return {}
    siblings = [
        other[0]
        for other, loss, role in zip(members, losses, roles, strict=True)
        if loss == losses[index] and not role and not other[0].evaluation_only
    ]
    settings = [method_settings(other) for other in siblings]
    keys = sorted({key for each in settings for key in each})
    own = method_settings(run)
    weight = run.config.get("delta_weight")
    shown: dict[str, Any] = {}
    for key in keys:
        if len({repr(each.get(key)) for each in settings}) < 2:
            continue
        is_weight = key.startswith("loss.") and all(
            each.get(key) == other.config.get("delta_weight") for each, other in zip(settings, siblings, strict=True)
        )
        shown["delta_weight" if is_weight else key.removeprefix("loss.")] = weight if is_weight else own.get(key)
    return {key: _short(value) for key, value in shown.items()}


def _short(value: Any) -> str:
    """Return a path's last two parts; other values as written on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    is_path = isinstance(value, str) and value.count("/") > 1
    return "/".join(Path(str(value)).parts[-2:]) if is_path else str(value)


def _unique(labels: Sequence[str]) -> list[str]:
    """Return the labels, numbering duplicates."""
    counts: dict[str, int] = {}
    unique = []
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
        unique.append(label if counts[label] == 1 else f"{label} ({counts[label]})")
    return unique
