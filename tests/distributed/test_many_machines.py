"""torchrun, SLURM and submitit: what they say, what is asked of them, and real processes started as they start them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext
from hydra.utils import instantiate
from safetensors.torch import load_file

from deltakd.config.build import make_settings
from deltakd.config.compose import CONF_DIR, check_overrides, compose_config
from deltakd.distributed.launchers import Launch, alone_problems, launch_problems, read_launch
from deltakd.distributed.ranks import agreed, main_process_first
from deltakd.distributed.strategies import cluster_plugin
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import LAST
from deltakd.training.callbacks.checkpoints import read_checkpoint
from tests.distributed import slurm_stand_ins
from tests.distributed.processes import free_port
from tests.tiny import World, save_model

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RESTART_COUNT": "0",
}


def slurm(rank: int, tasks: int = 2, nodes: int = 1, job: int = 4711, **more: str) -> dict[str, str]:
    """The variables of one task, as srun sets them."""
    per_node = tasks // nodes
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NAME": "kd",
        "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % per_node),
        "SLURM_NODEID": str(rank // per_node),
    } | more


def without(variables: dict[str, str], *prefixes: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if not name.startswith(prefixes)}


def test_what_the_launchers_say() -> None:
    assert read_launch({"RANK": "1", "SLURM_JOB_ID": "1"}) is None
    assert read_launch(TORCHRUN) == Launch("torchrun", 3, 4, 2, None, restarted=False)
    again = TORCHRUN | {"TORCHELASTIC_RUN_ID": "mine", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert read_launch(again) == Launch("torchrun", 3, 4, 2, "torchrun_mine", restarted=True)
    assert read_launch(slurm(1) | again) == read_launch(again), "torchrun within a job of SLURM"
    assert read_launch(slurm(3, 4, 2)) == Launch("SLURM", 3, 4, 2, "slurm_4711", restarted=False)
    requeued = read_launch(slurm(0, SLURM_RESTART_COUNT="2"))
    assert requeued is not None
    assert requeued.restarted
    assert read_launch(slurm(0) | {"SLURM_JOB_NAME": "interactive"}) is None
    # The batch script itself has the job's variables, too.
    alone = read_launch(without(slurm(0), "SLURM_STEP"))
    assert alone is not None
    assert "write srun before the command" in alone.problem
    uneven = read_launch(without(slurm(0), "SLURM_NTASKS_PER_NODE"))
    assert uneven is not None
    assert "give #SBATCH --ntasks-per-node=N" in uneven.problem
    single = read_launch(without(slurm(0, tasks=1), "SLURM_STEP", "SLURM_NTASKS_PER_NODE"))
    assert single is not None
    assert single.problem == ""


def test_devices_and_nodes_must_be_what_was_started() -> None:
    launch = read_launch(TORCHRUN)
    for devices in (2, "2", [0, 1], "0,1", "auto", -1):
        assert launch_problems(launch, devices, 2) == []
    (problem,) = launch_problems(launch, 4, 1)
    assert problem == (
        "torchrun started 4 process(es) on 2 machine(s), but trainer.devices is 4 and trainer.num_nodes is 1; give "
        "trainer.devices=2 trainer.num_nodes=2, or torchrun --nnodes 1 --nproc_per_node 4"
    )
    (problem,) = launch_problems(read_launch(slurm(0, tasks=1)), 2, 1)
    assert problem.endswith("give trainer.devices=1 trainer.num_nodes=1, or #SBATCH --nodes=1 --ntasks-per-node=2")
    assert launch_problems(None, 8, 4) == []
    assert alone_problems(read_launch(slurm(0, tasks=1))) == []
    assert "this command is one process" in alone_problems(launch)[0]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], None]:
    def put(variables: Mapping[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_a_wrong_launch_is_told_with_all_other_problems(
    world: World, tmp_path: Path, environment: Callable[[Mapping[str, str]], None]
) -> None:
    environment(slurm(0))
    with pytest.raises(ConfigError, match=r"(?s)2 problems:.*max_steps is 0.*SLURM started 2 process\(es\) on 1 mach"):
        make_settings(compose_config("train", world.overrides(tmp_path, "sft", "trainer.max_steps=0")))


def test_lightning_leaves_the_queue_to_us(environment: Callable[[Mapping[str, str]], None]) -> None:
    assert cluster_plugin() is None
    environment(slurm(1))
    plugin = cluster_plugin()
    assert plugin is not None
    assert not plugin.auto_requeue
    assert (plugin.global_rank(), plugin.world_size()) == (1, 2)


def in_ranks(action: Callable[[int, Path], None], ranks: int, folder: Path) -> list[int]:
    """Exit codes of processes that do something together, as tasks of SLURM."""

    def run(rank: int) -> None:
        os.environ.update(slurm(rank, ranks, MASTER_PORT=port))
        action(rank, folder)

    port = str(free_port())
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def make_a_file(rank: int, folder: Path) -> None:
    with main_process_first("file"):
        path = folder / "made"
        if rank == 0:
            time.sleep(0.3)
        # Two at a time would both find it missing.
        if not path.exists():
            path.touch(exist_ok=False)
            (folder / f"by {rank}").touch()
    (folder / agreed("name", f"of {rank}")).touch()


def refuse(rank: int, folder: Path) -> None:
    with main_process_first("first"):
        pass
    with main_process_first("second"):
        (folder / f"tried {rank}").touch()
        if rank == 1:
            sys.exit(2)
    (folder / "went on").touch()


def test_rank_0_goes_first_and_all_agree(tmp_path: Path) -> None:
    assert in_ranks(make_a_file, 3, tmp_path) == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by 0", "made", "of 0"]


def test_where_one_rank_refuses_all_end(tmp_path: Path) -> None:
    assert in_ranks(refuse, 3, tmp_path) == [2, 2, 2]
    assert not (tmp_path / "went on").exists()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands first in PATH; the folder in which they keep what they were given."""
    folder = slurm_stand_ins.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "jobs"


def submit(overrides: Sequence[str], jobs: Sequence[Sequence[str]]) -> None:
    """Hand the jobs to the launcher that the overrides choose."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
        launcher = instantiate(cfg.hydra.launcher)
        context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=None)
        launcher.setup(hydra_context=context, task_function=print, config=cfg)
        launcher.launch(jobs, 0)


def test_what_is_submitted(tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_REFUSES", "1")
    overrides = [
        "hydra/launcher=slurm", "trainer.devices=4", "trainer.num_nodes=2", "hydra.launcher.partition=gpu",
        "hydra.launcher.setup=[module load cuda]", "+hydra.launcher.additional_parameters.reservation=mine",
        "hydra.launcher.array_parallelism=2", f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]  # fmt: skip
    with pytest.raises(Exception, match="out of order"):
        submit(overrides, [["loss=sft"], ["loss=kd"], ["loss=delta_kd"]])
    script = (commands / "0.sh").read_text()
    options = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert options >= {
        "job-name=deltakd", "partition=gpu", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=4",
        "time=240", "signal=USR2@120", "array=0-2%2", "requeue", "open-mode=append", "reservation=mine",
    }  # fmt: skip
    assert not any(option.startswith(("account", "qos", "mem")) for option in options)
    command = script.splitlines()[-1]
    assert command.startswith("srun --unbuffered --output ")
    assert f"{sys.executable} -u -m submitit.core._submit {tmp_path / 'sweep' / '.submitit'}/%j" in command
    assert script.index("module load cuda") < script.index(command)


def test_a_launcher_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_overrides("train", ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "loss=sft,kd"])
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_submitit_launcher", None)
    with pytest.raises(ConfigError, match=r"hydra/launcher=slurm needs .* pip install 'deltakd\[launchers\]'"):
        check_overrides("train", ["hydra/launcher=slurm"])


# Real processes from here on.


def student(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "student" / "model.safetensors")


def arguments(world: World, *extra: str, run_dir: Path | None = None) -> list[str]:
    """``-m deltakd.train`` without dropout, since each rank draws its own; 4 rows a process unless told otherwise."""
    path = world.root / "plain"
    if not path.is_dir():
        save_model(path, seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    common = [f"model.student.path={path}", "optim.lr=0.001", "optim.eps=1e-4", "trainer.accelerator=cpu", "name=tiny"]
    common += ["trainer.max_steps=40"]
    chosen = world.overrides(run_dir or Path("none"), "kd", *common, *extra)
    return ["-m", "deltakd.train", *(o for o in chosen if run_dir or not o.startswith("run_dir="))]


def start(command: Sequence[str], cwd: Path, **variables: str) -> subprocess.Popen[str]:
    environment = without(dict(os.environ), "SLURM_", "TORCHELASTIC_") | {"OMP_NUM_THREADS": "1"} | variables
    with (cwd / f"{len(list(cwd.glob('*.log')))}.log").open("w") as log:
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log, text=True)


def end(processes: Sequence[subprocess.Popen[str]], cwd: Path) -> list[int]:
    """Exit codes; what was said is in the message where one is not expected."""
    codes = [process.wait(timeout=300) for process in processes]
    for path in sorted(cwd.glob("*.log")):
        print(path, path.read_text()[-3000:])
    return codes


@pytest.fixture(scope="module")
def one_process(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student that all others must be, of steps of eight rows."""
    directory = tmp_path_factory.mktemp("one")
    command = [sys.executable, *arguments(world, "data.batch_size=8", run_dir=directory / "run")]
    assert end([start(command, directory)], directory) == [0]
    return directory / "run"


def assert_same_student(directory: Path, expected: Path) -> None:
    found, wanted = student(directory), student(expected)
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-6)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working directory of its own, for ``outputs/``."""
    (tmp_path / "cwd").mkdir()
    return tmp_path / "cwd"


@pytest.mark.slow
def test_torchrun_on_one_machine_and_on_two(world: World, one_process: Path, elsewhere: Path) -> None:
    """Nobody gave a run_dir, the tokenised data are not there yet: neither may cost the ranks their agreement."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    fresh = f"data.cache_dir={elsewhere / 'cache'}"
    one = [*torchrun, "--nproc_per_node", "2", *arguments(world, fresh, "strategy=ddp", "trainer.devices=2")]
    assert end([start(one, elsewhere)], elsewhere) == [0]
    (first,) = (elsewhere / "outputs" / "tiny").iterdir()
    assert_same_student(first, one_process)
    agents = [
        [*torchrun, "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1", "--master_addr", "127.0.0.1",
         "--master_port", str(port), *arguments(world, fresh, "strategy=ddp", "trainer.num_nodes=2")]
        for port in [free_port()] for rank in (0, 1)
    ]  # fmt: skip
    assert end([start(agent, elsewhere) for agent in agents], elsewhere) == [0, 0]
    (second,) = set((elsewhere / "outputs" / "tiny").iterdir()) - {first}
    assert_same_student(second, one_process)


@pytest.mark.slow
def test_a_job_of_slurm_is_told_to_end_and_goes_on_when_it_comes_back(
    world: World, one_process: Path, elsewhere: Path
) -> None:
    job = free_port()
    command = [sys.executable, *arguments(world, "strategy=ddp", "trainer.num_nodes=2")]
    command += ["trainer.checkpoint_every_n_steps=1"]

    def tasks(**variables: str) -> list[subprocess.Popen[str]]:
        return [start(command, elsewhere, **slurm(rank, nodes=2, job=job, **variables)) for rank in (0, 1)]

    processes = tasks()
    last = elsewhere / "outputs" / "tiny" / f"slurm_{job}" / "checkpoints" / LAST
    wait_for(lambda: last.is_file(), processes)
    # To one rank alone: all of them have to end in the same way.
    processes[1].send_signal(signal.SIGUSR1)
    assert end(processes, elsewhere) == [128 + signal.SIGUSR1] * 2
    assert 0 < read_checkpoint(last)["global_step"] < 40
    assert not list(elsewhere.rglob("hpc_ckpt*"))
    # The same command and the same id: a job that comes back goes on by itself.
    assert end(tasks(SLURM_RESTART_COUNT="1"), elsewhere) == [0, 0]
    assert_same_student(last.parents[1], one_process)


@pytest.mark.slow
def test_a_multirun_by_slurm_comes_to_its_end(world: World, one_process: Path, elsewhere: Path, commands: Path) -> None:
    """Two jobs of two tasks; the first is told that its time is over, and goes on when it is back from the queue."""
    options = ["strategy=ddp", "trainer.devices=2", "trainer.checkpoint_every_n_steps=1", "optim.lr=0.001,0.002"]
    launcher = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "--multirun"]
    parent = [start([sys.executable, *arguments(world, *options), *launcher], elsewhere)]
    wait_for(lambda: bool(list(elsewhere.glob("outputs/multirun/*/0/checkpoints/last.ckpt"))), parent)
    for path in commands.glob(f"{slurm_stand_ins.FIRST_JOB + 1}-*.pid"):
        os.kill(int(path.read_text()), signal.SIGUSR2)
    assert end(parent, elsewhere) == [0]
    (root,) = (elsewhere / "outputs" / "multirun").iterdir()
    restarts = {path.stem: json.loads(path.read_text())[-1] for path in commands.glob("*.json")}
    assert restarts == {f"{slurm_stand_ins.FIRST_JOB}_0": 1, f"{slurm_stand_ins.FIRST_JOB}_1": 0}
    states = [json.loads((root / "jobs" / f"{number}.json").read_text())["state"] for number in (0, 1)]
    assert states == ["finished"] * 2
    assert len((root / "multirun.csv").read_text().splitlines()) == 3
    assert_same_student(root / "0", one_process)


def wait_for(condition: Callable[[], bool], processes: Sequence[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if condition():
            return
        assert all(process.poll() is None for process in processes), [process.args for process in processes]
        time.sleep(0.2)
    raise AssertionError("it did not come to that")
