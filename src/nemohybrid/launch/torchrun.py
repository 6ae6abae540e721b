"""torchrun on this machine, or on several that meet at one of them."""

from nemohybrid.launch.job import Job
from nemohybrid.launch.render import fill
from nemohybrid.launch.shell import common


def render(job: Job, max_restarts: int, rendezvous: str | None) -> str:
    """The script that becomes torchrun. rendezvous: HOST:PORT, where several machines meet."""
    values = common(job) | {"max_restarts": str(max_restarts)}
    if job.nodes == 1:
        return fill("torchrun.sh", values)
    assert rendezvous is not None, "the command asks for it"
    return fill("torchrun_nodes.sh", values | {"nodes": str(job.nodes), "rendezvous": rendezvous, "name": job.name})
