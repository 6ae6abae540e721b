"""SLURM on one machine, as far as a batch script sees it: `srun`, `scontrol` and `sbatch` that really run what they are given.

    python fake_slurm.py srun|scontrol|sbatch ARGUMENT...

FAKE_SLURM names a folder in which they write down what they were asked: `requeued` a line a job, `submitted` the script,
`asked` what became of its options, `srun` those of srun, `tasks` the process ids of the tasks, which are what SLURM signals.
Statuses are those of srun(1), and a cluster may kill all tasks after the first that fails (KillOnBadExit), as this one does
unless it is told otherwise.
"""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

FOLDER = Path(os.environ["FAKE_SLURM"])


def sbatch(words: list[str]) -> int:
    """Takes a script on standard input and keeps it. Variables SBATCH_... win over options in it."""
    script = sys.stdin.read()
    (FOLDER / "submitted").write_text(script)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))
    for variable, value in os.environ.items():
        if variable.startswith("SBATCH_"):
            name = variable.removeprefix("SBATCH_").lower().replace("_", "-")
            asked[{"timelimit": "time"}.get(name, name)] = value
    (FOLDER / "asked").write_text(json.dumps(asked))
    print("Submitted batch job 4242")
    return int(os.environ.get("FAKE_SBATCH_STATUS", 0))


def scontrol(words: list[str]) -> int:
    """`show hostnames LIST`, and `requeue JOB`, which a cluster may refuse."""
    if words[:2] == ["show", "hostnames"]:
        print("\n".join(_hosts(words[2])))
        return 0
    assert words[0] == "requeue", words
    with (FOLDER / "requeued").open("a") as file:
        print(words[1], file=file)
    return int(os.environ.get("FAKE_REQUEUE_STATUS", 0))


def _hosts(names: str) -> list[str]:
    """`node[1-2]` -> node1, node2, as SLURM writes a list."""
    found = re.fullmatch(r"(\w+)\[(\d+)-(\d+)\]", names)
    return [f"{found[1]}{i}" for i in range(int(found[2]), int(found[3]) + 1)] if found else [names]


def srun(words: list[str]) -> int:
    """Starts every task here; returns the highest status, or 128 + signal, of any.

    The cluster's MPI is set up wrongly, and its tasks go round the nodes unless they are told otherwise.
    """
    options = {word.partition("=")[0]: word.partition("=")[2] for word in _options(words)}
    command = words[len(options) :]
    (FOLDER / "srun").write_text(json.dumps(options))
    if options.get("--mpi") != "none":
        return 1
    nodes, per_node = int(os.environ["SLURM_JOB_NUM_NODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    ranks = range(nodes * per_node)
    with open(options["--output"], "w") as log:  # noqa: PTH123 - a plain string
        places = [_task(r, nodes, per_node, options) | _of_image(options) for r in ranks]
        tasks = [subprocess.Popen(command, env=place, stdout=log, stderr=log) for place in places]
    (FOLDER / "tasks.new").write_text(" ".join(str(task.pid) for task in tasks))
    (FOLDER / "tasks.new").rename(FOLDER / "tasks")
    _wait(tasks, strict=options.get("--kill-on-bad-exit") != "0", patience=float(options.get("--wait") or 0))
    (FOLDER / "tasks").unlink()
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def _options(words: list[str]) -> list[str]:
    first = next(i for i, word in enumerate(words) if not word.startswith("--"))
    return words[:first]


def _task(rank: int, nodes: int, per_node: int, options: dict[str, str]) -> dict[str, str]:
    """SLURM_EXPORT_ENV=NONE is what `sbatch --export=NONE` leaves behind."""
    mine = {
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank % per_node if options.get("--distribution") == "block" else rank // nodes,
        "SLURM_CPUS_PER_TASK": options.get("--cpus-per-task", 1),
        "SLURM_NTASKS": nodes * per_node,
        "SLURM_NNODES": nodes,
    }
    bare = os.environ.get("SLURM_EXPORT_ENV") == "NONE" and options.get("--export") != "ALL"
    job = {"PATH": os.environ["PATH"]} if bare else dict(os.environ)
    return job | {name: str(value) for name, value in mine.items()}


def _of_image(options: dict[str, str]) -> dict[str, str]:
    """FAKE_IMAGE holds what an image sets, as JSON. It wins over the job, except for variables that pyxis is told by name."""
    named = options.get("--container-env", "").split(",")
    absent = [name for name in named if name and name not in os.environ]
    assert not absent, f"--container-env names {absent}, which nobody set"
    there = json.loads(os.environ.get("FAKE_IMAGE", "{}")) if "--container-image" in options else {}
    return {name: value for name, value in there.items() if name not in named}


def _wait(tasks: list[subprocess.Popen], strict: bool, patience: float) -> None:
    """strict: the first bad status ends all. patience: so long after the first end, whatever its status; 0: for ever."""
    first = None
    while any(task.poll() is None for task in tasks):
        ended = [task.returncode for task in tasks if task.poll() is not None]
        first = first or (time.monotonic() if ended else None)
        if (strict and any(ended)) or (first and patience and time.monotonic() > first + patience):
            for task in tasks:
                with suppress(ProcessLookupError):
                    task.kill()
        time.sleep(0.01)


if __name__ == "__main__":
    program, *rest = sys.argv[1:]
    sys.exit({"srun": srun, "scontrol": scontrol, "sbatch": sbatch}[program](rest))
