"""The configs of a study's runs, and the stages that they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from deltakd.config.compose import compose_config
from deltakd.config.folders import is_group
from deltakd.io.errors import ConfigError
from deltakd.studies.study_file import Job, Study, check_keys, stages_read
from deltakd.types import TEACHER, is_reference_role


def compose_jobs(study: Study, jobs: Sequence[Job]) -> dict[str, DictConfig]:
    """Return run -> its config; the runs of a study form one W&B group unless the study names another.

    Args:
        study: the study.
        jobs: runs of it, the keys of whose overrides have been checked (``check_keys``).

    Raises:
        ConfigError: Hydra can't compose one.
    """
    configs: dict[str, DictConfig] = {}
    for job in jobs:
        cfg = compose_config("train", job.overrides, checked=True)
        if cfg.logger and "wandb" in cfg.logger and cfg.logger.wandb.group is None:
            cfg.logger.wandb.group = study.name
        configs[job.name] = cfg
    return configs


def check_jobs(study: Study, jobs: Sequence[Job], checked: bool = False) -> None:
    """Compose a run for every choice of config groups in every stage, and check that what the runs read is there.

    Composing takes a tenth of a second: a study of a thousand runs that differ in numbers should not wait for all.

    Args:
        study: the study.
        jobs: runs of it.
        checked: True if the keys of their overrides have been checked (``check_keys``).

    Raises:
        ConfigError: an override has an unknown key or choice, with the nearest one; or a stage that is read is neither
            finished nor among these runs.
    """
    if not checked:
        check_keys(jobs)
    unmade = {
        stage
        for stage in set(study.jobs) - {job.stage.name for job in jobs}
        if not all(other.directory.finished for other in study.jobs[stage])
    }
    if not unmade:
        compose_jobs(study, one_of_each_choice(jobs))
        return
    waiting: dict[str, set[str]] = {}
    configs = compose_jobs(study, jobs)
    for job in jobs:
        for stage in stages_read_by(job, configs[job.name], study) & unmade:
            waiting.setdefault(stage, set()).add(job.stage.name)
    order = list(study.jobs)
    if waiting:
        raise ConfigError(
            [
                f"stage {stage} is not finished, and {', '.join(sorted(readers, key=order.index))} reads it; give "
                f"--stages {stage}, too"
                for stage, readers in sorted(waiting.items(), key=lambda item: order.index(item[0]))
            ]
        )


def one_of_each_choice(jobs: Sequence[Job]) -> list[Job]:
    """Return the first of the runs of a stage that choose the same configs (``loss=...``); their values may differ."""
    first: dict[tuple[str, ...], Job] = {}
    for job in jobs:
        chosen = (override for override in job.overrides if is_group(override.partition("=")[0].lstrip("+~")))
        first.setdefault((job.stage.name, *chosen), job)
    return list(first.values())


def stages_read_by(job: Job, cfg: DictConfig, study: Study) -> set[str]:
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
    return stages_read(parts | {"model": {k: v for k, v in model.items() if k not in unread}}, study.name)
