"""A PyTorchJob of Kubeflow's training operator: a pod a node, torchrun in each."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from nemohybrid.launch.job import Job
from nemohybrid.launch.render import fill

SPARE_SECONDS = 30
"""Of the grace period, for what comes before and after a save."""


@dataclass(frozen=True)
class Cluster:
    """What a pod has. volumes: (claim, path) of persistent volumes; secret: the name of the one with WANDB_API_KEY.

    max_restarts: of the run, all pods together.
    """

    image: str
    secret: str
    max_restarts: int
    namespace: str | None = None
    workdir: str | None = None
    volumes: tuple[tuple[str, str], ...] = ()


def render(job: Job, cluster: Cluster) -> str:
    """The manifest for kubectl. Strings are written as JSON, which is YAML."""
    return fill(
        "kubernetes.yaml",
        {
            "command": job.command,
            "name": json.dumps(job.name),
            "namespace": f"namespace: {json.dumps(cluster.namespace)}" if cluster.namespace else "",
            "max_restarts": str(cluster.max_restarts),
            "backoff_limit": str(cluster.max_restarts * job.nodes + 1),
            "grace_seconds": str(job.save_seconds + SPARE_SECONDS),
            "save_seconds": str(job.save_seconds),
            "image": json.dumps(cluster.image),
            "workdir": f"workingDir: {json.dumps(cluster.workdir)}" if cluster.workdir else "",
            "words": _items(map(json.dumps, _command(job)), 16),
            "secret": json.dumps(cluster.secret),
            "gpus": f"resources: {{limits: {{nvidia.com/gpu: {job.gpus_per_node}}}}}" if job.on_gpus else "",
            "mounts": _items(_mounts(cluster), 16),
            "volumes": _items(_claims(cluster), 12),
            "workers": _workers(job.nodes - 1),
        },
    )


def _command(job: Job) -> list[str]:
    several = ["--node-rank=$(RANK)", "--master-addr=$(MASTER_ADDR)", "--master-port=$(MASTER_PORT)"]
    alone = ["--standalone"]
    return [
        *(job.python, "-m", "torch.distributed.run", f"--nnodes={job.nodes}", f"--nproc-per-node={job.gpus_per_node}"),
        *(several if job.nodes > 1 else alone),
        *("-m", "nemohybrid", "train"),
        *(word.replace("$(", "$$(") for word in job.overrides),  # Kubernetes would look for a variable
    ]


def _workers(replicas: int) -> str:
    """The pods beside the first, which Kubeflow calls master."""
    return fill("kubernetes_workers.yaml", {"replicas": str(replicas)}).rstrip("\n") if replicas else ""


def _mounts(cluster: Cluster) -> list[str]:
    return [f"{{name: volume-{i}, mountPath: {json.dumps(path)}}}" for i, (_, path) in enumerate(cluster.volumes)]


def _claims(cluster: Cluster) -> list[str]:
    return [
        f"{{name: volume-{i}, persistentVolumeClaim: {{claimName: {json.dumps(claim)}}}}}"
        for i, (claim, _) in enumerate(cluster.volumes)
    ]


def _items(lines: Iterable[str], indent: int) -> str:
    return "\n".join(f"{' ' * indent}- {line}" for line in lines)
