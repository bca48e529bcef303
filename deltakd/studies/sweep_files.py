"""Reads Weights & Biases sweep files, and checks them against W&B's schema and our keys before anything starts."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakd.config.compose import check_overrides
from deltakd.config.folders import choice_files, is_group
from deltakd.io.errors import ConfigError
from deltakd.io.yaml_files import read_yaml
from deltakd.studies.sweep_values import number_problem, text_problem

log = logging.getLogger(__name__)

#: The program that a sweep's command must run.
PROGRAM = "deltakd.train"

#: Groups whose choices may change any key of the config.
_GLOBAL_GROUPS = ("experiment", "debug", "hparams_search")

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Choices:
    """A parameter that takes one of several values (W&B: ``values``).

    Args:
        values: the values, in the file's order.
    """

    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Interval:
    """A parameter drawn from an interval (W&B: uniform, log_uniform_values, q_uniform, int_uniform).

    Args:
        low: the smallest value.
        high: the largest value.
        log: True if its logarithm is uniform.
        step: distance between allowed values; None: no restriction.
        integer: True if only whole numbers are allowed.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False

    @property
    def whole(self) -> bool:
        """True if each value is a whole number, and written as one."""
        return self.integer or (isinstance(self.low, int) and isinstance(self.step, int))


Parameter = Choices | Interval


@dataclass(frozen=True)
class Hyperband:
    """Early termination of poor runs; one unit of resource is one validation.

    Args:
        min_resource: validations before a run may be ended.
        max_resource: validations of a whole run; None: as many as the first finished run had.
        reduction_factor: one run in this many continues.
    """

    min_resource: int
    max_resource: int | None
    reduction_factor: int


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file.

    Args:
        path: the file.
        method: grid, random or bayes.
        metric: the objective, such as ``val/rougeL``.
        goal: maximize or minimize.
        overrides: those of the command, and the parameters with one value.
        parameters: the parameters to search.
        hyperband: early termination, or None.
        run_cap: maximum number of runs, or None.
    """

    path: Path
    method: str
    metric: str
    goal: str
    overrides: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    hyperband: Hyperband | None
    run_cap: int | None

    @property
    def maximize(self) -> bool:
        """True if a higher metric is better."""
        return self.goal == "maximize"

    def grid(self) -> Iterator[dict[str, Scalar]]:
        """Yield all combinations of the parameters' values; the last parameter changes fastest."""
        columns = [_grid_values(parameter) for parameter in self.parameters.values()]
        for values in itertools.product(*columns):
            yield dict(zip(self.parameters, values, strict=True))


def _grid_values(parameter: Parameter) -> tuple[Scalar, ...]:
    if isinstance(parameter, Choices):
        return parameter.values
    assert parameter.step is not None
    count = math.floor((parameter.high - parameter.low) / parameter.step + 1e-9) + 1
    values = [parameter.low + i * parameter.step for i in range(count)]
    return tuple(int(v) if parameter.integer else v for v in values)


def override(key: str, value: Scalar) -> str:
    """Return a value as a Hydra override."""
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def merge_overrides(*groups: Sequence[str]) -> list[str]:
    """Return all overrides, with only the last one for each key."""
    return list({text.split("=", 1)[0]: text for group in groups for text in group}.values())


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read and check a sweep file.

    Args:
        path: the file.
        overrides: additional Hydra overrides; they take precedence over the file's command.

    Raises:
        ConfigError: lists all problems: violations of W&B's schema (if the package ``sweeps`` is installed), values
            that can't become overrides, and unknown keys and choices, with the nearest ones.
    """
    content = _load(path)
    problems = _schema_problems(content)
    parameters = _parameters(content.get("parameters"), problems)
    problems += _method_problems(content, parameters)
    base, command_problems = _command_overrides(content.get("command"))
    problems += command_problems
    metric = content.get("metric") if isinstance(content.get("metric"), dict) else None
    if metric is None or not isinstance(metric.get("name"), str):
        problems.append("metric is missing; give metric: {name: val/rougeL, goal: maximize}")
    elif metric.get("goal", "minimize") not in ("maximize", "minimize"):
        problems.append(f"metric.goal is {metric['goal']!r}; allowed: maximize, minimize")
    fixed = merge_overrides(base, overrides)
    problems += _key_problems(fixed, parameters)
    hyperband = _hyperband(content.get("early_terminate"), problems)
    cap = content.get("run_cap")
    if cap is not None and not (isinstance(cap, int) and cap > 0):
        problems.append(f"run_cap is {cap!r}; give a whole number above 0")
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in dict.fromkeys(problems)])
    assert metric is not None
    single = {k: p for k, p in parameters.items() if isinstance(p, Choices) and len(p.values) == 1}
    constants = [override(key, choice.values[0]) for key, choice in single.items()]
    searched = {key: parameter for key, parameter in parameters.items() if key not in single}
    return Sweep(
        path,
        content["method"],
        str(metric["name"]),
        metric.get("goal", "minimize"),
        tuple(merge_overrides(fixed, constants)),
        searched,
        hyperband,
        cap,
    )


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError([f"{path} does not exist; give a sweep file, such as sweeps/delta_weight.yaml"])
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError([f"{path} is not a mapping; give method, metric and parameters"])
    return content


def wandb_schema() -> Any:
    """Return the validator of W&B's own schema, from the package ``sweeps``; None if that is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package was written for an older pydantic
            from sweeps.config.schema import validator
    except ImportError:
        return None
    return validator


def _schema_problems(content: dict[str, Any]) -> list[str]:
    """Return the violations of W&B's own schema."""
    validator = wandb_schema()
    if validator is None:
        log.info("The package `sweeps` is not installed: the file is checked against our keys, not W&B's schema.")
        return []
    # The schema's release is older than this key, which the server understands.
    known = {key: value for key, value in content.items() if key != "run_cap"}
    if isinstance(known.get("parameters"), dict):
        # Of names with a slash the schema shows its regular expression; `_parameters` says what to do.
        known["parameters"] = {k: v for k, v in known["parameters"].items() if "/" not in str(k)}
    found = []
    for error in validator.iter_errors(known):
        where = ".".join(map(str, error.absolute_path))
        found.append(f"{where}: {error.message}" if where else error.message)
    return found


def _parameters(given: Any, problems: list[str]) -> dict[str, Parameter]:
    """Read the parameters to search; invalid ones become problems."""
    if not isinstance(given, dict) or not given:
        problems.append(f"parameters is {given!r}; give {{optim.lr: {{values: [0.001, 0.003]}}}}")
        return {}
    parameters: dict[str, Parameter] = {}
    for name, entry in given.items():
        if "/" in str(name):
            group = str(name).split("/")[0]
            problems.append(
                f"parameters.{name}: W&B takes no slash in a parameter's name; give one choice in the command "
                f"({name}=NAME), search over {group}: {{values: [...]}}, or use deltakd.train --multirun {name}=A,B"
            )
            continue
        try:
            parameters[str(name)] = _parameter(entry)
        except ValueError as error:
            problems.append(f"parameters.{name}: {error}")
    return parameters


def _parameter(entry: Any) -> Parameter:
    """Return one parameter of the file.

    Raises:
        ValueError: it can't be searched over, or can't become an override.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"is {entry!r}; give {{value: ...}}, {{values: [...]}} or {{min: ..., max: ...}}")
    if "parameters" in entry:
        raise ValueError("nested parameters can't become overrides; write the key with dots: optim.lr")
    if "value" in entry or "values" in entry:
        values = [entry["value"]] if "value" in entry else entry["values"]
        if not isinstance(values, list) or not values:
            raise ValueError(f"values is {values!r}; give a list with at least one value")
        strange = [value for value in values if not isinstance(value, bool | int | float | str)]
        if strange:
            # W&B would write them as Python does: None, {'a': 1}.
            raise ValueError(f"{strange[0]!r} can't become an override; write it as Hydra reads it, in quotes: 'null'")
        found = [problem for value in values if isinstance(value, str) and (problem := text_problem(value))]
        if found:
            raise ValueError("; ".join(found))
        return Choices(tuple(values))
    return _interval(entry)


def _interval(entry: dict[str, Any]) -> Interval:
    if "min" not in entry or "max" not in entry:
        raise ValueError(f"needs values, or numbers as min and max; it has {', '.join(map(str, entry)) or 'nothing'}")
    numbers = {name: entry[name] for name in ("min", "max", "q") if name in entry}
    found = [problem for name, value in numbers.items() if (problem := number_problem(name, value))]
    if found:
        raise ValueError("; ".join(found))
    low, high, step = entry["min"], entry["max"], entry.get("q", 1.0)
    if low >= high:
        raise ValueError(f"min {low} is not less than max {high}")
    whole = isinstance(low, int) and isinstance(high, int)
    kind = entry.get("distribution", "int_uniform" if whole else "uniform")
    if kind == "uniform":
        return Interval(low, high)
    if kind == "int_uniform":
        return Interval(low, high, step=1, integer=True)
    if kind == "q_uniform":
        if step <= 0:
            raise ValueError(f"q is {step}; it must be above 0")
        return Interval(low, low + math.floor((high - low) / step + 1e-9) * step, step=step)
    if kind == "log_uniform_values":
        if low <= 0:
            raise ValueError(f"min is {low}; under log_uniform_values it must be above 0")
        return Interval(low, high, log=True)
    raise ValueError(
        f"distribution {kind!r} is not known here; allowed: uniform, log_uniform_values, q_uniform, int_uniform, "
        "categorical (values), constant (value)"
    )


def _method_problems(content: dict[str, Any], parameters: Mapping[str, Parameter]) -> list[str]:
    method = content.get("method")
    if method not in ("grid", "random", "bayes"):
        return [f"method is {method!r}; allowed: grid, random, bayes"]
    return [
        f"parameters.{name}: a grid needs values, int_uniform or q_uniform"
        for name, parameter in parameters.items()
        if method == "grid" and isinstance(parameter, Interval) and parameter.step is None
    ]


def _command_overrides(command: Any) -> tuple[list[str], list[str]]:
    """Return the overrides in a sweep's command, and its problems."""
    wanted = f"[${{env}}, ${{interpreter}}, -m, {PROGRAM}, key=value, ..., ${{args_no_hyphens}}]"
    if not isinstance(command, list):
        return [], [f"command is missing: W&B would pass --key=value, which Hydra does not read; give {wanted}"]
    words = [str(word) for word in command]
    found = [word for word in words if "=" in word and not word.startswith(("-", "$"))]
    strange = [w for w in words if w not in found and w not in ("-m", PROGRAM) and not w.startswith("${")]
    problems = [f"command holds {word!r}, which is neither an override nor {wanted}" for word in strange]
    if "${args_no_hyphens}" not in words:
        problems.append(f"command lacks ${{args_no_hyphens}}, the place of the parameters; give {wanted}")
    return found, problems


def _key_problems(fixed: Sequence[str], parameters: Mapping[str, Parameter]) -> list[str]:
    """Return keys and choices that do not exist in the config, under all combinations of the groups' choices."""
    groups = {key: p.values for key, p in parameters.items() if isinstance(p, Choices) and is_group(key)}
    rest = [override(key, p.values[0] if isinstance(p, Choices) else p.low) for key, p in parameters.items()]
    rest = [text for text in rest if text.split("=", 1)[0] not in groups]
    problems: list[str] = []
    exist: dict[str, list[Scalar]] = {}
    for key, values in groups.items():
        # A config can't be composed with a choice that does not exist; the keys are checked with the others.
        exist[key] = [value for value in values if choice_files(key, str(value))]
        for value in (v for v in values if v not in exist[key]):
            _add_problems([override(key, value)], problems)
    keys = [text.split("=", 1)[0] for text in (*fixed, *rest)]
    columns = []
    for key, choices in exist.items():
        # Composing takes a third of a second: each choice is tried only where other keys may depend on it.
        matters = key in _GLOBAL_GROUPS or any(other.startswith(f"{key}.") for other in keys)
        columns.append([override(key, value) for value in choices][: None if matters else 1])
    for chosen in itertools.product(*filter(None, columns)):
        _add_problems(merge_overrides(fixed, chosen, rest), problems)
    return problems


def _add_problems(overrides: Sequence[str], problems: list[str]) -> None:
    try:
        check_overrides("train", overrides)
    except ConfigError as error:
        problems += error.problems


def _hyperband(settings: Any, problems: list[str]) -> Hyperband | None:
    """``min_iter``, or ``max_iter`` and ``s`` (the number of brackets); W&B's default of eta is 3."""
    if settings is None:
        return None
    if not isinstance(settings, dict) or settings.get("type") != "hyperband":
        problems.append(f"early_terminate is {settings!r}; give {{type: hyperband, min_iter: 3}}")
        return None
    eta = settings.get("eta", 3)
    if not isinstance(eta, int) or eta < 2:
        problems.append(f"early_terminate.eta is {eta!r}; give a whole number from 2")
        return None
    if isinstance(settings.get("min_iter"), int) and settings["min_iter"] >= 1:
        return Hyperband(settings["min_iter"], None, eta)
    top, brackets = settings.get("max_iter"), settings.get("s")
    if isinstance(top, int) and isinstance(brackets, int) and top >= 1 <= brackets:
        return Hyperband(max(1, top // eta**brackets), top, eta)
    problems.append("early_terminate needs min_iter, or max_iter and s: whole numbers from 1")
    return None
