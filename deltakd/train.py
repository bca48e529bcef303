"""Train one model: ``python -m deltakd.train experiment=delta_kd_gpt2 [key=value ...]``."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from deltakd.cli import guarded
from deltakd.config.compose import check_overrides, register_folders, whole_mappings
from deltakd.config.folders import CONF_DIR, use_config_dir
from deltakd.config.key_help import key_help
from deltakd.distributed.ranks import agreed, external_launch, is_main_process, launch_id
from deltakd.io.run_directory import RUN_DIR_VARIABLE, RunDirectory
from deltakd.studies.multirun import Job, run_job
from deltakd.studies.same_jobs import earlier_job, find_same_jobs, in_words, tell_jobs

#: Set by `wandb agent` for the runs that it starts.
SWEEP_VARIABLE, RUN_ID_VARIABLE = "WANDB_SWEEP_ID", "WANDB_RUN_ID"


def _run_dir(cfg: DictConfig) -> Path:
    """Return the run directory; each job of a multirun and each run of a W&B sweep has its own.

    The processes that Lightning starts for further ranks run this same command and get the directory from the
    environment. If torchrun or SLURM starts all ranks, none may name a directory by its own clock.
    """
    launch = external_launch()
    job = HydraConfig.get()
    if launch is None and not is_main_process() and RUN_DIR_VARIABLE in os.environ:
        # It goes through all jobs of a multirun, and was told the directory of the one that started it.
        told = Path(os.environ[RUN_DIR_VARIABLE])
        return told.with_name(str(job.job.num)) if job.mode == RunMode.MULTIRUN else told
    if job.mode == RunMode.MULTIRUN:
        if cfg.run_dir:
            return Path(cfg.run_dir) / str(job.job.num)
        return Path(agreed(f"directory of job {job.job.num}", job.runtime.output_dir))
    if SWEEP_VARIABLE in os.environ and RUN_ID_VARIABLE in os.environ:
        # Agents start runs in the same second, and give all of them the same run_dir.
        root = cfg.run_dir or f"outputs/{cfg.name}/{os.environ[SWEEP_VARIABLE]}"
        return Path(root) / os.environ[RUN_ID_VARIABLE]
    if cfg.run_dir:
        return Path(cfg.run_dir)
    # A restarted job finds its directory by its id.
    job_id = launch_id()
    return Path(f"outputs/{cfg.name}") / (job_id or agreed("directory", f"{datetime.now():%Y-%m-%d_%H-%M-%S}"))


@hydra.main(str(CONF_DIR), "train", version_base="1.3")
def _train(cfg: DictConfig) -> float | None:
    if HydraConfig.get().mode == RunMode.MULTIRUN and earlier_job(HydraConfig.get().job.num) is not None:
        return float("nan")  # it was said at the start
    # This imports torch; --help and a mistyped key should not wait for it. A wrong value should not wait for Lightning
    # and the models, which are imported once the config is right.
    from deltakd.config.build import make_settings

    if cfg.trainer.dry_run:
        if is_main_process():
            settings = guarded(lambda: make_settings(cfg), "")
            from deltakd.estimates.memory import show_memory

            guarded(lambda: show_memory(settings), "")
        return None
    run_dir = _run_dir(cfg)
    os.environ[RUN_DIR_VARIABLE] = str(run_dir)
    job = HydraConfig.get()
    multirun = job.mode == RunMode.MULTIRUN
    root = Path(cfg.run_dir or job.sweep.dir) if multirun else run_dir
    how_to_resume = f"the same command with resume=true run_dir={root}"

    def action() -> float:
        settings = guarded(lambda: make_settings(cfg), how_to_resume)
        from deltakd.training.run import run_training

        return guarded(lambda: run_training(settings, run_dir, how_to_resume), how_to_resume)

    value = run_job(Job(job.job.num, root, job.overrides.task, run_dir), action) if multirun else action()
    if is_main_process() and RunDirectory(run_dir).finished:
        objective = RunDirectory(run_dir).read_summary()["meta"]["objective"]
        print(f"{objective} = {value:.6g}  ({run_dir})")
    return value


#: Printed only by ``deltakd.train``.
WHAT_TO_GIVE = """nothing to train yet; give models and data:
  python -m deltakd.train loss=delta_kd model.student.path=... model.teacher.path=... model.teacher_raw.path=... \\
      data.train=my.jsonl
or write them into a file, once:
  python -m deltakd.init my_run student=... teacher=... teacher_raw=... data=my.jsonl
  python -m deltakd.train experiment=my_run
or take an experiment of conf/experiment, for a first try the invented world of the quickstart:
  python -m deltakd.study experiments/quickstart     # makes its models, and compares; or, once they are there:
  python -m deltakd.train experiment=quickstart
--help says what every key means."""


def main() -> None:
    given = get_args_parser().parse_args(sys.argv[1:])
    if set(sys.argv[1:]) <= {"--multirun", "-m"}:
        print(f"error: {WHAT_TO_GIVE}", file=sys.stderr)
        sys.exit(2)
    guarded(lambda: use_config_dir(given.config_dir), "")
    if given.help:
        print(key_help(given.overrides))
        return
    register_folders()
    # Completion has its own words in place of overrides.
    if not given.shell_completion:
        guarded(lambda: check_overrides("train", given.overrides), "")
    if given.multirun and not given.shell_completion:
        same = guarded(lambda: find_same_jobs(given.overrides), "")
        tell_jobs(same)
        if same and is_main_process():
            print(in_words(same), file=sys.stderr)
    if not given.shell_completion:
        opened = dict(zip(given.overrides, whole_mappings(given.overrides), strict=True))
        sys.argv[1:] = [opened.get(word, word) for word in sys.argv[1:]]
    _train()


if __name__ == "__main__":
    main()
