"""The configs of a study's runs, and the stages that they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError
from deltakd.studies.study_file import Job, Study, check_keys, stages_read
from deltakd.types import TEACHER, is_reference_role


def compose_jobs(study: Study, jobs: Sequence[Job], checked: bool = False) -> dict[str, DictConfig]:
    """Return run -> its config; the runs of a study form one W&B group unless the study names another.

    Args:
        study: the study.
        jobs: runs of it.
        checked: True if the keys of their overrides have been checked (``check_keys``).

    Raises:
        ConfigError: an override has an unknown key or choice; the nearest one is named.
    """
    if not checked:
        check_keys(jobs)
    configs: dict[str, DictConfig] = {}
    for job in jobs:
        cfg = compose_config("train", job.overrides, checked=True)
        if cfg.logger and "wandb" in cfg.logger and cfg.logger.wandb.group is None:
            cfg.logger.wandb.group = study.name
        configs[job.name] = cfg
    return configs


def check_predecessors(study: Study, jobs: Sequence[Job], configs: Mapping[str, DictConfig]) -> None:
    """Check that every stage that is read is finished, or runs earlier.

    Raises:
        ConfigError: names all stages that do not.
    """
    waiting: dict[str, set[str]] = {}
    order = list(study.jobs)
    chosen = {job.stage.name for job in jobs}
    for job in jobs:
        for stage in _stages_read(job, configs[job.name], study.name) & set(order) - chosen:
            if not all(other.directory.finished for other in study.jobs[stage]):
                waiting.setdefault(stage, set()).add(job.stage.name)
    if waiting:
        raise ConfigError(
            [
                f"stage {stage} is not finished, and {', '.join(sorted(readers, key=order.index))} reads it; give "
                f"--stages {stage}, too"
                for stage, readers in sorted(waiting.items(), key=lambda item: order.index(item[0]))
            ]
        )


def _stages_read(job: Job, cfg: DictConfig, study: str) -> set[str]:
    """Return the stages whose files a run opens: data, its student, a cache, or else the references it loads."""
    parts = {
        key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("data", "model", "evaluation", "reference")
    }
    try:
        requires = instantiate(cfg.loss).requires
    except InstantiationException:
        requires = ()  # the plan of the run says what is wrong
    model: Any = parts["model"]
    reference: Any = parts["reference"]
    if job.stage.command == "generate":
        requires = {TEACHER}
    elif job.stage.command == "train" and "path" in reference:
        requires = ()  # all references are read from there
    unread = {role for role in model if is_reference_role(role) and role not in requires}
    return stages_read(parts | {"model": {k: v for k, v in model.items() if k not in unread}}, study)
