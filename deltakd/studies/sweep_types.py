"""Checks values of a sweep file against the types of their keys, before anything starts."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deltakd.config.build import make_step_settings
from deltakd.config.compose import compose_config
from deltakd.config.folders import is_group
from deltakd.io.errors import ConfigError
from deltakd.studies.sweep_files import Choices, Parameter, Scalar, Sweep, merge_overrides, override


def check_types(sweep: Sweep) -> None:
    """Try each value separately, under the first choice of each group; paths are not checked.

    Raises:
        ConfigError: lists every value of the wrong type for its key.
    """
    tried = {key: _tried(parameter) for key, parameter in sweep.parameters.items()}
    first = [override(key, values[0]) for key, values in tried.items()]
    cfg = compose_config("train", merge_overrides(sweep.overrides, first), checked=True)
    problems: list[str] = []
    changes = [(key, value) for key, values in tried.items() if not is_group(key) for value in values]
    for key, value in changes:
        changed = copy.deepcopy(cfg)
        text = override(key, value)
        try:
            OmegaConf.update(changed, key, OverridesParser.create().parse_override(text).value(), merge=False)
            make_step_settings(changed)
        except ConfigError as error:
            problems += error.problems
        except OmegaConfBaseException as error:
            problems.append(f"{text}: {' '.join(str(error).split())}")
    if problems:
        raise ConfigError([f"{sweep.path}: {problem}" for problem in dict.fromkeys(problems)])


def _tried(parameter: Parameter) -> Sequence[Scalar]:
    """Return all values, or the ends of an interval in the form in which they are drawn."""
    if isinstance(parameter, Choices):
        return parameter.values
    ends = (parameter.low, parameter.high)
    return ends if parameter.whole else tuple(map(float, ends))
