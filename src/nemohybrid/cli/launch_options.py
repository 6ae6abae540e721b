"""The options of `nemohybrid launch`, a parser for each launcher."""

import argparse

from nemohybrid.cli.arguments import whole_number

DESCRIPTION = """Start a run on one machine or many. The configuration is checked here, for as many ranks as there will be, so
that a mistake does not wait in a queue; then a script is written that anybody can read, and started.

Overrides stand behind -- and are those of `train`. --dry-run prints the script and starts nothing."""
EXAMPLES = """examples:
  nemohybrid launch torchrun --gpus-per-node 8 -- model=tiny data.train=corpus/train run.dir=runs/mine
  nemohybrid launch torchrun --nodes 2 --rendezvous node1:29400 -- ...      # the same on each of the two machines
  nemohybrid launch slurm --nodes 4 --time 24:00:00 --partition gpu -- ...
  nemohybrid launch slurm --container-image /images/nemohybrid.sqsh --dry-run -- ...
  nemohybrid launch kubernetes --nodes 2 --image registry/nemohybrid:1 --volume runs:/workspace/runs -- ...

nemohybrid launch LAUNCHER --help has the options of each."""


def parser() -> argparse.ArgumentParser:
    """The options of all launchers; `launcher` says which was chosen."""
    p = argparse.ArgumentParser(
        "nemohybrid launch",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    launchers = p.add_subparsers(required=True, metavar="LAUNCHER", dest="launcher")
    _torchrun(launchers.add_parser("torchrun", help="one machine, or the same command on each of several"))
    _slurm(launchers.add_parser("slurm", help="sbatch, with a container or without"))
    _kubernetes(launchers.add_parser("kubernetes", help="kubectl, a PyTorchJob of Kubeflow"))
    return p


def _torchrun(p: argparse.ArgumentParser) -> None:
    _common(p)
    _for_a_shell(p)
    meet = "where several machines meet: one of them, and a free port"
    p.add_argument("--rendezvous", metavar="HOST:PORT", help=meet)
    restarts = "of all ranks after a crash, from the newest checkpoint (default 0 on one machine, 3 on several)"
    p.add_argument("--max-restarts", type=_count, metavar="N", help=restarts)
    p.set_defaults(container=None)


def _slurm(p: argparse.ArgumentParser) -> None:
    _common(p)
    _for_a_shell(p)
    p.add_argument("--time", default="24:00:00", help="limit of an attempt, as SLURM writes it (default 24:00:00)")
    p.add_argument("--partition", help="where to queue (default: the cluster's)")
    p.add_argument("--account", help="who pays (default: yours)")
    cores = "cores of a rank: those of a node / GPUs (default 8)"
    p.add_argument("--cpus-per-task", type=whole_number, default=8, metavar="N", help=cores)
    share = "others may use the rest of a node, and --sbatch=--mem=... says how much is yours; without it nobody may"
    p.add_argument("--share-nodes", action="store_true", help=share)
    p.add_argument("--max-requeues", type=_count, default=20, metavar="N", help="starts after the first (default 20)")
    p.add_argument("--logs", default="logs", metavar="FOLDER", help="a file an attempt (default logs)")
    further = "a further option of sbatch, as --sbatch=--qos=high; repeat it for more"
    p.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help=further)
    image = "with nemohybrid in it, by pyxis and enroot: a file .sqsh, or REGISTRY#IMAGE:TAG"
    p.add_argument("--container-image", dest="container", metavar="IMAGE", help=image)
    mount = "/SOURCE:/TARGET in the container; repeat it for more. The folder of the job is there without"
    p.add_argument("--mount", action="append", default=[], metavar="MOUNT", help=mount)


def _kubernetes(p: argparse.ArgumentParser) -> None:
    _common(p)
    p.add_argument("--image", dest="container", required=True, help="a container image with nemohybrid in it")
    p.add_argument("--namespace", help="default: that of kubectl")
    p.add_argument("--workdir", metavar="FOLDER", help="in the container (default: that of the image)")
    volume = "CLAIM:/PATH, a persistent volume that all pods can write to; at least one, for the run folder"
    p.add_argument("--volume", action="append", default=[], metavar="VOLUME", help=volume)
    secret = "of Kubernetes, with the keys WANDB_API_KEY and HF_TOKEN where they are needed (default nemohybrid)"
    p.add_argument("--secret", default="nemohybrid", help=secret)
    restarts = "of the run, whose pods start again together (default 20)"
    p.add_argument("--max-restarts", type=_count, default=20, metavar="N", help=restarts)
    p.set_defaults(elsewhere=True, setup=None)


def _common(p: argparse.ArgumentParser) -> None:
    p.allow_abbrev = False  # a script would say that a short --dry had written it
    p.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="behind --: those of `nemohybrid train`")
    p.add_argument("--nodes", type=whole_number, default=1, metavar="N", help="machines (default 1)")
    gpus = "ranks of a machine, one for each GPU; with run.device=cpu so many processes (default 8)"
    p.add_argument("--gpus-per-node", type=whole_number, default=8, metavar="N", help=gpus)
    p.add_argument("--name", help="of the job (default: run.name)")
    p.add_argument("--python", default="python", help="the interpreter there (default python, as PATH has it)")
    save = "seconds for a step and a save, between a signal and the end (default 300)"
    p.add_argument("--save-seconds", type=whole_number, default=300, metavar="S", help=save)
    p.add_argument("--dry-run", action="store_true", help="print the script and start nothing")


def _for_a_shell(p: argparse.ArgumentParser) -> None:
    p.add_argument("--setup", metavar="FILE", help="a shell script that is sourced first: modules, an environment")
    elsewhere = "corpora and checkpoints lie where only the nodes see them: do not look for them here"
    p.add_argument("--elsewhere", action="store_true", help=elsewhere)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
