"""Reads the environment variables that torchrun and SLURM, which start all ranks, set in each process."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Names of SLURM's interactive jobs, whose processes a person started, not srun.
_INTERACTIVE = ("bash", "interactive")

#: Choice of ``hydra/launcher`` -> the package that provides it.
_LAUNCHERS = {
    "slurm": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "joblib": "hydra_joblib_launcher",
}


@dataclass(frozen=True)
class Launch:
    """How the processes of a run were started, unless by Lightning.

    Args:
        name: ``torchrun`` or ``SLURM``.
        rank: of this process, over all machines.
        world_size: processes over all machines.
        nodes: machines (torchrun: agents).
        id: the same for all ranks, and for a later start of the same job; None if there is none.
        restarted: True if the launcher started the same job before.
        problem: why the ranks can't be joined as started; empty if they can.
    """

    name: str
    rank: int
    world_size: int
    nodes: int
    id: str | None
    restarted: bool
    problem: str = ""


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """Read torchrun's, or else SLURM's, information about this process, in Lightning's order.

    Args:
        environ: the environment.

    Returns:
        None if neither started it.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        run = environ["TORCHELASTIC_RUN_ID"]
        return Launch(
            name="torchrun",
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            nodes=int(environ.get("GROUP_WORLD_SIZE", 1)),
            # Without --rdzv_id, all runs have the id none.
            id=None if run in ("", "none") else f"torchrun_{run}",
            restarted=int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0,
        )
    if "SLURM_NTASKS" not in environ or environ.get("SLURM_JOB_NAME") in _INTERACTIVE:
        return None
    return Launch(
        name="SLURM",
        rank=int(environ.get("SLURM_PROCID", 0)),
        world_size=int(environ["SLURM_NTASKS"]),
        nodes=int(environ.get("SLURM_NNODES") or environ.get("SLURM_JOB_NUM_NODES") or 1),
        id=f"slurm_{environ['SLURM_JOB_ID']}" if environ.get("SLURM_JOB_ID") else None,
        restarted=int(environ.get("SLURM_RESTART_COUNT") or 0) > 0,
        problem=_slurm_problem(environ),
    )


def _slurm_problem(environ: Mapping[str, str]) -> str:
    tasks = int(environ["SLURM_NTASKS"])
    if tasks == 1:
        return ""
    if not any(name.startswith("SLURM_STEP") for name in environ):
        return (
            f"SLURM has given this job {tasks} tasks, but this process runs alone: srun did not start it; write "
            "srun before the command in the batch script"
        )
    if "SLURM_NTASKS_PER_NODE" not in environ:
        return (
            f"SLURM started {tasks} processes, but not a given number on each machine, which Lightning needs to know; "
            "give #SBATCH --ntasks-per-node=N in place of --ntasks"
        )
    return ""


def launch_problems(launch: Launch | None, devices: Any, num_nodes: int) -> list[str]:
    """Return how ``trainer.devices`` and ``trainer.num_nodes`` differ from the started processes, one sentence each.

    Args:
        launch: from ``read_launch``.
        devices: ``trainer.devices``; ``auto`` and -1 are left to Lightning, which looks for GPUs.
        num_nodes: ``trainer.num_nodes``.
    """
    if launch is None:
        return []
    if launch.problem:
        return [launch.problem]
    per_node = launch.world_size // launch.nodes
    wanted = count_devices(devices)
    if num_nodes == launch.nodes and wanted in (None, per_node):
        return []
    options = {
        "torchrun": f"torchrun --nnodes {num_nodes} --nproc_per_node {wanted or per_node}",
        "SLURM": f"#SBATCH --nodes={num_nodes} --ntasks-per-node={wanted or per_node}",
    }
    return [
        f"{launch.name} started {launch.world_size} process(es) on {launch.nodes} machine(s), but trainer.devices is "
        f"{devices} and trainer.num_nodes is {num_nodes}; give trainer.devices={per_node} "
        f"trainer.num_nodes={launch.nodes}, or {options[launch.name]}"
    ]


def alone_problems(launch: Launch | None) -> list[str]:
    """Return why a single-process command can't run as it was started: as several processes."""
    if launch is None or launch.world_size == 1:
        return []
    return [
        f"{launch.name} started {launch.world_size} processes, but this command is one process; start it without "
        f"{'torchrun' if launch.name == 'torchrun' else 'srun, or with --ntasks=1'}"
    ]


def launcher_problems(choices: Sequence[str]) -> list[str]:
    """Return one sentence for each choice of ``hydra/launcher`` whose package is not installed."""
    return [
        f"hydra/launcher={choice} needs the package {_LAUNCHERS[choice].replace('_', '-')}, which is not installed: "
        "pip install 'deltakd[launchers]'"
        for choice in choices
        if choice in _LAUNCHERS and importlib.util.find_spec(f"hydra_plugins.{_LAUNCHERS[choice]}") is None
    ]


def count_devices(devices: Any) -> int | None:
    """Return how many devices of a machine ``trainer.devices`` asks for; None: all of them."""
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    if isinstance(devices, list | tuple):
        return len(devices)
    try:
        return int(devices) if int(devices) >= 0 else None
    except (TypeError, ValueError):
        return None
