"""Stand-ins for the commands of SLURM: a batch script really runs, as processes of this machine.

``sbatch`` keeps the script and starts it, one time for each index of an array; ``srun`` starts the tasks with the
variables that SLURM gives them; ``scontrol requeue`` starts a script again.
"""

from __future__ import annotations

import sys
from pathlib import Path

#: Where the next jobs' ids come from; ports are derived from their last four digits.
FIRST_JOB = 71000

_COMMON = """#!{python}
import json, os, re, subprocess, sys
from pathlib import Path

folder = Path(__file__).parent / "jobs"
folder.mkdir(exist_ok=True)

def options(script):
    return dict(re.findall(r"^#SBATCH --([\\w-]+)=(.*)$", Path(script).read_text(), re.M))

def start(script, job, array, index, restarts):
    given = options(script)
    nodes, per_node = int(given.get("nodes", 1)), int(given.get("ntasks-per-node", 1))
    name = job if array is None else f"{{array}}_{{index}}"
    (folder / f"{{name}}.json").write_text(json.dumps([script, job, array, index, restarts]))
    variables = {{
        "SLURM_JOB_ID": job, "SLURM_JOB_NAME": given["job-name"], "SLURM_RESTART_COUNT": restarts,
        "SLURM_NTASKS": nodes * per_node, "SLURM_NTASKS_PER_NODE": per_node, "SLURM_NNODES": nodes,
        "SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0,
    }}
    if array is not None:
        variables |= {{"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index}}
    environment = os.environ | {{k: str(v) for k, v in variables.items()}}
    with open(folder / f"{{name}}.log", "a") as log:
        subprocess.Popen(["bash", script], env=environment, stdout=log, stderr=log, start_new_session=True)
"""

_SBATCH = """
kept = folder / f"{{len(list(folder.glob('*.sh')))}}.sh"
kept.write_text(Path(sys.argv[1]).read_text())
if os.environ.get("SBATCH_REFUSES"):
    sys.exit("sbatch: error: this cluster is out of order")
job = {first} + 100 * int(kept.stem)
array = options(kept).get("array")
if array is None:
    start(str(kept), job, None, None, 0)
else:
    first, last = array.split("%")[0].split("-")
    for index in range(int(first), int(last) + 1):
        start(str(kept), job + 1 + index, job, index, 0)
print(f"Submitted batch job {{job}}")
"""

_SRUN = """
arguments = sys.argv[1:]
outputs = {{}}
while arguments[0].startswith("--"):
    option = arguments.pop(0)
    if option in ("--output", "--error"):
        outputs[option] = arguments.pop(0)
tasks, per_node = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
job, array, index = (os.environ.get(f"SLURM_{{n}}", "") for n in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
processes = []
for rank in range(tasks):
    variables = {{
        "SLURM_PROCID": rank, "SLURM_LOCALID": rank % per_node, "SLURM_NODEID": rank // per_node,
        "SLURM_STEP_ID": 0, "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_TASKS": tasks,
    }}
    streams = {{}}
    for option, name in (("--output", "stdout"), ("--error", "stderr")):
        if option in outputs:
            path = outputs[option]
            for mark, value in (("%A", array), ("%a", index), ("%j", job), ("%t", str(rank))):
                path = path.replace(mark, value)
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            streams[name] = open(path, "a")
    environment = os.environ | {{k: str(v) for k, v in variables.items()}}
    processes.append(subprocess.Popen(arguments, env=environment, **streams))
    (folder / f"{{job}}-{{rank}}.pid").write_text(str(processes[-1].pid))
codes = [process.wait() for process in processes]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

_SCONTROL = """
assert sys.argv[1] == "requeue", sys.argv
script, job, array, index, restarts = json.loads((folder / f"{{sys.argv[2]}}.json").read_text())
start(script, job, array, index, restarts + 1)
"""

_SACCT = """
print("JobID|State|NodeList")
for path in folder.glob("*.json"):
    print(f"{{path.stem}}|RUNNING|127.0.0.1")
"""


def install(folder: Path) -> Path:
    """Write the commands into a folder, for PATH; what they keep is in its ``jobs``."""
    folder.mkdir()
    bodies = {"sbatch": _SBATCH, "srun": _SRUN, "scontrol": _SCONTROL, "sacct": _SACCT, "squeue": _SACCT}
    for name, body in bodies.items():
        path = folder / name
        path.write_text((_COMMON + body).format(python=sys.executable, first=FIRST_JOB))
        path.chmod(0o755)
    return folder
