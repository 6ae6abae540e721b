"""`sbatch`: one task a rank under srun, with or without a container, saved before the time limit and queued again."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from nemohybrid.errors import REQUEUE
from nemohybrid.launch.job import Job
from nemohybrid.launch.render import fill
from nemohybrid.launch.shell import common

OF_THE_SCRIPT = (
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "tasks-per-node", "ntasks-per-gpu", "cpus-per-task"),
    *("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "cpus-per-gpu", "gpu-bind", "gres"),
    *("tres-per-task", "tres-bind", "time", "signal", "requeue", "no-requeue", "open-mode", "output"),
    *("array", "wrap", "test-only"),
)
"""Options of sbatch that would change what the script counts on."""
OF_WHOLE_NODES = ("exclusive", "oversubscribe", "share", "mem", "mem-per-cpu", "mem-per-gpu")
WITH_OPTIONS_HERE = ("partition", "account")
VARIABLES = {"time": "SBATCH_TIMELIMIT", "array": "SBATCH_ARRAY_INX", "mem": "SBATCH_MEM_PER_NODE"}
"""Those that are not named after their option."""


@dataclass(frozen=True)
class Queue:
    """What SLURM is asked for beside nodes and GPUs. directives: further options of sbatch, such as `--qos=high`."""

    time: str
    cpus_per_task: int
    max_requeues: int
    logs: str
    whole_nodes: bool = True
    partition: str | None = None
    account: str | None = None
    directives: tuple[str, ...] = ()
    image: str | None = None
    mounts: tuple[str, ...] = ()


def render(job: Job, queue: Queue) -> str:
    """The script for sbatch."""
    return fill(
        "slurm.sh",
        common(job)
        | {
            "name": job.name,
            "nodes": str(job.nodes),
            "gpus": f"#SBATCH --gpus-per-node={job.gpus_per_node}" if job.on_gpus else "",
            "cpus_per_task": str(queue.cpus_per_task),
            "whole_nodes": "#SBATCH --exclusive\n#SBATCH --mem=0" if queue.whole_nodes else "",
            "time": queue.time,
            "directives": "\n".join(f"#SBATCH {directive}" for directive in _directives(queue)),
            "max_requeues": str(queue.max_requeues),
            "logs": shlex.quote(queue.logs),
            "container": _container(queue),
            "requeue": str(REQUEUE),
        },
    )


def taken(whole_nodes: bool) -> tuple[str, ...]:
    """Options of sbatch that nobody may pass on."""
    return OF_THE_SCRIPT + WITH_OPTIONS_HERE + (OF_WHOLE_NODES if whole_nodes else ())


def outvoting(script: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables by which a shell changes what `script` decides, and the options they stand for.

    To sbatch they count more than the options in a script (sbatch(1), input environment variables).
    """
    said = re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)
    decided = {*said, *OF_THE_SCRIPT, *(OF_WHOLE_NODES if "mem" in said else ())}
    named = {VARIABLES.get(option, f"SBATCH_{option.replace('-', '_').upper()}"): option for option in sorted(decided)}
    return {variable: option for variable, option in named.items() if variable in environment}


def _directives(queue: Queue) -> list[str]:
    partition = [f"--partition={queue.partition}"] if queue.partition else []
    account = [f"--account={queue.account}"] if queue.account else []
    return [*partition, *account, *queue.directives]


def _container(queue: Queue) -> str:
    if queue.image is None:
        return ""
    mounts = "\n".join(f"mounts+={shlex.quote(f',{mount}')}" for mount in queue.mounts)
    return fill("container.sh", {"image": shlex.quote(queue.image), "mounts": mounts}).rstrip("\n")
