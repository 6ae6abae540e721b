"""SLURM's side of a job: a batch script is started with the variables that its #SBATCH lines ask for, its tasks are signalled."""

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from processes import end, kill_all, start, wait_for


class Cluster:
    """Jobs in the folder `work`; the stand-ins of fake_slurm.py write in `folder`."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work = folder, work
        self.batch: subprocess.Popen[str] | None = None
        self.job = str(40_000 + os.getpid() % 10_000)  # the port follows from it

    def start(self, script: str, attempt: int = 0, **environment: str) -> None:
        """One attempt of the job."""
        asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script, re.MULTILINE))
        file = self.folder / "slurm_script"
        file.write_text(script)
        variables = {
            "SLURM_JOB_ID": self.job,
            "SLURM_JOB_NAME": asked["job-name"],
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_NUM_NODES": asked["nodes"],
            "SLURM_NTASKS_PER_NODE": asked["ntasks-per-node"],
            "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
            **({"SLURM_RESTART_COUNT": str(attempt)} if attempt else {}),
        }
        self.batch = start(["bash", str(file)], self.work, variables | environment)

    def run(self, script: str, attempt: int = 0, **environment: str) -> tuple[int, str]:
        """An attempt from its start to its end: exit status and output."""
        self.start(script, attempt, **environment)
        return self.end()

    def end(self) -> tuple[int, str]:
        """Exit status and output of the attempt."""
        assert self.batch is not None
        return end(self.batch)

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until something is so, while the batch script runs."""
        assert self.batch is not None
        wait_for(condition, self.batch, self.logs)

    def signal_tasks(self, number: signal.Signals) -> None:
        """As `sbatch --signal` does: children of SLURM's daemon, neither their children nor the batch script."""
        for task in (self.folder / "tasks").read_text().split():
            os.kill(int(task), number)

    def cancel(self) -> None:
        """As `scancel` does: SIGTERM to the batch script too."""
        assert self.batch is not None
        self.batch.send_signal(signal.SIGTERM)
        self.signal_tasks(signal.SIGTERM)

    def requeued(self) -> list[str]:
        """A number for every `scontrol requeue`."""
        file = self.folder / "requeued"
        return file.read_text().split() if file.exists() else []

    def logs(self) -> str:
        """What the attempts wrote."""
        return "\n".join(file.read_text() for file in sorted(self.work.glob("logs/*")))

    def clean(self) -> None:
        """Leave nothing running."""
        if self.batch is not None:
            kill_all(self.batch, self.work)
