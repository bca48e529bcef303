"""Finds jobs of a multirun that would train the same model twice, since they read the same settings."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deltakd.config.compose import compose_config

#: Tells the jobs' processes which jobs duplicate another one: ``{"3": 1}``.
SAME_JOBS_VARIABLE = "DELTAKD_SAME_JOBS"

#: Composing takes a tenth of a second per job: more jobs are not compared.
MOST = 256

#: Keys that name or place a run, and ``delta_weight``, which counts only if a loss copies it.
_NO_PART = ("run_dir", "delta_weight")


def find_same_jobs(overrides: Sequence[str]) -> dict[int, int]:
    """Return job -> the earlier job that is the same run, numbered as by Hydra's basic sweeper.

    ``loss=kd,delta_kd delta_weight=0.5,1`` is three runs, not four: ``kd`` reads no ``delta_weight``.

    Args:
        overrides: of the multirun; their keys have been checked.

    Raises:
        ConfigError: a job can't be composed.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    sweeps = [override for override in parsed if override.is_sweep_override()]
    if not all(override.is_discrete_sweep() for override in sweeps):
        return {}
    columns = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [str(override.input_line)]
        for override in parsed
        if not override.key_or_group.startswith("hydra")
    ]
    jobs = list(itertools.islice(itertools.product(*columns), MOST + 1))
    if not 1 < len(jobs) <= MOST:
        return {}
    first: dict[str, int] = {}
    same: dict[int, int] = {}
    for number, job in enumerate(jobs):
        earlier = first.setdefault(_identity(job), number)
        if earlier != number:
            same[number] = earlier
    return same


def _identity(overrides: Sequence[str]) -> str:
    cfg = compose_config("train", overrides, checked=True)
    try:
        config = OmegaConf.to_container(cfg, resolve=True)
    # The job itself says what is wrong.
    except OmegaConfBaseException:
        return json.dumps(list(overrides))
    assert isinstance(config, Mapping)
    return json.dumps({str(k): v for k, v in config.items() if k not in _NO_PART}, sort_keys=True, default=str)


def tell_jobs(same: Mapping[int, int]) -> None:
    """Tell the jobs, in this process and those started by launchers, which of them duplicate another one."""
    os.environ[SAME_JOBS_VARIABLE] = json.dumps(same)


def earlier_job(number: int) -> int | None:
    """Return the job that this job would repeat; None if there is none."""
    told = json.loads(os.environ.get(SAME_JOBS_VARIABLE, "{}"))
    return None if str(number) not in told else int(told[str(number)])


def in_words(same: Mapping[int, int]) -> str:
    """Log which jobs are not run, and why."""
    pairs = ", ".join(f"{number} is {earlier}" for number, earlier in same.items())
    return (
        f"{len(same)} of the jobs would train the same model as an earlier one, since they differ in nothing that they "
        f"read (delta_weight counts only for losses that use it): {pairs}. Each is run once."
    )
