"""`nemohybrid launch slurm|torchrun|kubernetes ... -- OVERRIDE...`: check a run, write its script, start it."""

import argparse
import os
import shlex
from collections.abc import Sequence

from nemohybrid.cli.initial_model import with_initial_model
from nemohybrid.cli.launch_options import parser
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.section import leaves
from nemohybrid.errors import ConfigError
from nemohybrid.launch import checks, kubernetes, slurm, torchrun
from nemohybrid.launch.job import Job, checked_config
from nemohybrid.launch.submit import become, hand_to


def main(argv: list[str]) -> int:
    """Write the script and start it; returns the status of who was given it. Raises ConfigError for what cannot run."""
    options = parser().parse_args(argv)
    words = [checks.one_line("OVERRIDE", word) for word in options.overrides]
    unseen = ["packages"] * bool(options.container) + ["files"] * options.elsewhere
    config = checked_config(with_initial_model(words), options.nodes, options.gpus_per_node, unseen)
    text = SCRIPTS[options.launcher](options, _job(options, argv, words, config))
    values = [str(value) for _, _, value in leaves(config)]
    checks.refuse_secrets([text, *argv, *values], os.environ)  # the text has them quoted
    if options.dry_run:
        print(text, end="")
        return 0
    if options.launcher not in READERS:
        become(text)
    outvoting = slurm.outvoting(text, os.environ) if options.launcher == "slurm" else {}
    return hand_to(READERS[options.launcher], text, outvoting)


def _job(options: argparse.Namespace, argv: Sequence[str], words: Sequence[str], config: RunConfig) -> Job:
    said = shlex.join(["nemohybrid", "launch", *(word for word in argv if word != "--dry-run")])
    return Job(
        command=checks.one_line("the command", said),
        overrides=tuple(words),
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        name=checks.name("--name", options.name) if options.name else _named_like(config.run.name),
        run_dir=config.run.dir,
        python=checks.program(options.python),
        save_seconds=options.save_seconds,
        setup=None if options.setup is None else checks.setup(options.setup, look=not options.elsewhere),
        on_gpus=config.run.device != "cpu",
    )


def _named_like(run: str) -> str:
    """The name of a run, as every scheduler takes it: at most 50 small letters, digits and -, the first a letter."""
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in run).strip("-").lower() or "nemohybrid"
    return (name if name[0].isalpha() else f"run-{name}")[:50].rstrip("-")


def _torchrun(options: argparse.Namespace, job: Job) -> str:
    several, where = job.nodes > 1, options.rendezvous
    if several and where is None:
        raise ConfigError(
            f"{job.nodes} machines must know where to meet. Give --rendezvous HOST:PORT, one of them and a port"
        )
    if not several and where is not None:
        raise ConfigError("--rendezvous: one machine meets by itself. Leave it out, or give --nodes")
    if where is not None:
        checks.rendezvous(where)
    restarts = (3 if several else 0) if options.max_restarts is None else options.max_restarts
    return torchrun.render(job, restarts, where)


def _slurm(options: argparse.Namespace, job: Job) -> str:
    checks.room_to_save(options.time, options.save_seconds)
    if options.mount and not options.container:
        raise ConfigError("--mount: there is no container to mount it in. Give --container-image, or leave it out")
    mounts = tuple(checks.mount(text) for text in options.mount)
    checks.distinct("--mount", [text.split(":")[1] for text in mounts])
    queue = slurm.Queue(
        time=options.time,
        cpus_per_task=options.cpus_per_task,
        max_requeues=options.max_requeues,
        logs=checks.one_line("--logs", options.logs),
        whole_nodes=not options.share_nodes,
        partition=options.partition and checks.names("--partition", options.partition),
        account=options.account and checks.name("--account", options.account),
        directives=tuple(checks.directive(text, slurm.taken(not options.share_nodes)) for text in options.sbatch),
        image=options.container and checks.image(options.container),
        mounts=mounts,
    )
    return slurm.render(job, queue)


def _kubernetes(options: argparse.Namespace, job: Job) -> str:
    legal = "small letters, digits and -, at most 50"
    checks.matching("--name", job.name, checks.JOB_NAME, f"{legal}, the first a letter")
    for option, text in (("--secret", options.secret), ("--namespace", options.namespace)):
        if text is not None:
            checks.matching(option, text, checks.CLUSTER_NAME, legal)
    volumes = tuple(checks.volume(text) for text in options.volume)
    checks.distinct("--volume", [path for _, path in volumes])
    checks.on_a_volume(job.run_dir, options.workdir, [path for _, path in volumes])
    cluster = kubernetes.Cluster(
        image=checks.one_line("--image", options.container),
        secret=options.secret,
        max_restarts=options.max_restarts,
        namespace=options.namespace,
        workdir=options.workdir and checks.one_line("--workdir", options.workdir),
        volumes=volumes,
    )
    return kubernetes.render(job, cluster)


SCRIPTS = {"torchrun": _torchrun, "slurm": _slurm, "kubernetes": _kubernetes}
READERS = {"slurm": ["sbatch"], "kubernetes": ["kubectl", "apply", "-f", "-"]}
"""Who is given a script. That of torchrun is run in place of this process."""
