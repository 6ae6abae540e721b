"""Parts that scripts of all launchers share."""

import shlex

from nemohybrid.launch.job import Job
from nemohybrid.launch.render import fill, words


def common(job: Job) -> dict[str, str]:
    """Values of every script for a shell."""
    return {
        "command": job.command,
        "gpus_per_node": str(job.gpus_per_node),
        "setup": setup(job.setup),
        "environment": fill("environment.sh", {}).rstrip("\n"),
        "overrides": words(job.overrides),
        "python": shlex.quote(job.python),
        "save_seconds": str(job.save_seconds),
    }


def setup(file: str | None) -> str:
    """The lines that read `file`."""
    return "" if file is None else fill("setup.sh", {"file": shlex.quote(file)})
