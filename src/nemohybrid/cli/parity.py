"""`nemohybrid parity OVERRIDE...`: does this layout compute what one rank computes, on this machine?"""

import argparse
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nemohybrid.cli.arguments import data_ranks_for, started_ranks, whole_number
from nemohybrid.cli.initial_model import with_initial_model
from nemohybrid.cli.parity_report import introduction, table, verdict
from nemohybrid.config.compose import compose_raw, load_config
from nemohybrid.config.overrides import usable_overrides
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError, Stopped, TrainingError

if TYPE_CHECKING:
    from nemohybrid.parallel.context import ParallelContext

NOTHING_TO_COMPARE = 2
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2}
"""Shares of the largest entry of a tensor, by compute dtype; docs/parity.md says why."""
MANY = 4
"""Tensor ranks; more of them add more summands, and get five times that."""
MICROBATCHES = 2
"""Of each data rank: the fewest whose gradients must add up; of each pipeline rank, for which it is two full rounds."""
DEFAULTS = (
    "data.sequence_length=64",
    "train.microbatch=1",
    "train.batch_ramp.start=null",
    "train.evaluate_every=0",
    "train.steps=1000",
    "optim.lr=1e-3",
    "optim.eps=1e-3",
    "optim.beta1=0.9",
    "optim.beta2=0.95",
    "optim.weight_decay=0.1",
    "optim.clip_grad_norm=1.0",
    "schedule.name=constant",
    "schedule.unit=steps",
    "schedule.warmup=0",
    "schedule.decay=0",
    "schedule.decay_style=linear",
    "schedule.total=null",
    "schedule.min_lr_ratio=0.01",
)
"""What the command line does not say, whatever an experiment says: a check is small, and its learning rate constant.

With this rate weights move by a few percent: a wrong update shows, and its rounding does not. With a smaller eps Adam would
divide noise by noise where a gradient is almost zero.
"""
SHRINK = "Rank 0 also trains the whole model alone: take fewer layers (model.pattern) or a smaller data.sequence_length"
NO_CORPUS = ("data.bundled=shakespeare", "data.train=null", "data.valid=null", "data.split=[]")
"""Satisfies the rules about data. Nothing is read: the rows are random tokens."""

DESCRIPTION = """Train a few steps under a parallel layout and on one rank alone, and compare every gradient and weight.

A wrong layout mostly has a right loss, so look before a long run: with your model, your layout, your machines. Rows are
random tokens in packed documents; no corpus is needed. Under torchrun its ranks are used, else they are started here."""
EXAMPLES = """examples:
  nemohybrid parity model=tiny parallel.tensor=2
  nemohybrid parity model=tiny_moe parallel.pipeline=2 parallel.expert=2
  torchrun --nproc-per-node 8 -m nemohybrid parity model=nemotron_h_8b 'model.pattern="M-M*-"' parallel.tensor=4

Overrides are those of `train`. What is not given of batch, length and optimizer is small here, whatever an experiment
says: rows of 64 tokens, two microbatches of one row on every data rank, times the ranks of a pipeline.

The memory of rank 0 must hold the whole model, its gradients and optimizer state (16 bytes a parameter), as it is trained
there alone. Shrink a large model to a few layers of each kind with model.pattern: all other sizes stay as they are.

exit status: 0 the layout equals one rank, 1 it does not or something failed, 2 nothing to compare"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(
        "nemohybrid parity",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="model, parallel, train, data.sequence_length, optim"
    )
    p.add_argument(
        "--ranks",
        type=whole_number,
        help="processes to start; default: parallel.tensor x parallel.pipeline x parallel.data, or x 2 or as many as the "
        "experts need where that is auto",
    )
    p.add_argument("--dtype", choices=tuple(TOLERANCES), default="float32", help="instead of model.dtype")
    p.add_argument(
        "--tolerance",
        type=_share,
        help="largest error, as a share of the largest entry of a tensor; default: 1e-5, with bfloat16 5e-2, as sums of "
        "parts are rounded; five times that with more than 4 tensor ranks",
    )
    p.add_argument("--steps", type=whole_number, default=3, help="optimizer steps (default 3)")
    p.add_argument("--top", type=whole_number, default=10, help="rows of the table of the worst tensors (default 10)")
    return p


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return share


def main(argv: list[str]) -> int:
    """Compare on the ranks of torchrun, or start some; returns the exit status."""
    args = parser().parse_intermixed_args(argv)
    started = _ranks_of_torchrun(args.ranks)
    config, ranks = composed(completed(with_initial_model(args.overrides), args.dtype), started or args.ranks)
    many = 5 if config.parallel.tensor > MANY else 1
    args.tolerance = args.tolerance or many * TOLERANCES[args.dtype]
    if ranks == 1:
        print(_NOTHING)
        return NOTHING_TO_COMPARE
    return check(config, args) if started else launch(argv, config, ranks)


_NOTHING = (
    "parity: one rank and no layout, there is nothing to compare. Ask for a layout, e.g. parallel.tensor=2, or for ranks "
    "that share the batch, e.g. --ranks 2"
)


def _ranks_of_torchrun(asked: int | None) -> int | None:
    """How many ranks torchrun has started; None without it. Raises ConfigError where others are asked for."""
    started = started_ranks()
    if started and asked not in (None, started):
        raise ConfigError(f"--ranks {asked}: torchrun has started {started} processes already; leave --ranks out")
    return started


def completed(words: Sequence[str], dtype: str) -> list[str]:
    """The words of a command line with what they leave out in front, so that they win, and the compute dtype."""
    named = any(word.lstrip("+").startswith(("data.train=", "data.bundled=")) for word in words)
    return [*DEFAULTS, *(() if named else NO_CORPUS), *words, f"model.dtype={dtype}"]


def composed(words: Sequence[str], ranks: int | None) -> tuple[RunConfig, int]:
    """The configuration, every rule checked, and how many ranks it is for: those given, else what the layout takes."""
    usable = [str(override.input_line) for override in usable_overrides(words, [])]  # load_config names the others
    cfg = compose_raw(usable)
    layout, microbatch = cfg.parallel, cfg.train.microbatch or 1
    others = max(1, layout.tensor * layout.pipeline * layout.context)
    data = (
        int(layout.data)
        if str(layout.data).isdecimal()
        else max(1, ranks // others)
        if ranks
        else max(2, data_ranks_for(layout))
    )
    ranks = ranks or others * max(1, data)
    batch = MICROBATCHES * max(1, data) * max(1, layout.pipeline) * microbatch
    return load_config([f"train.global_batch={batch}", *words], ranks), ranks


def launch(argv: Sequence[str], config: RunConfig, ranks: int) -> int:
    """The same command on `ranks` processes of this machine; returns its exit status.

    Raises TrainingError where a rank was killed. Torch's launcher runs in this process, to keep its traceback from standing
    below what the ranks have said.
    """
    _check_gpus(config.run.device, ranks)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what the launcher would set, with a warning
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(["--standalone", "--nproc-per-node", str(ranks), "-m", "nemohybrid", "parity", *argv])
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            raise TrainingError(_killed(rank, -first.exitcode)) from None
        return first.exitcode
    except SignalException as stopped:
        raise Stopped(f"stopped by {stopped.sigval.name}", 128 + stopped.sigval) from None
    return 0


def _killed(rank: int, number: int) -> str:
    memory = f": memory may have run out. {SHRINK}" if number == signal.SIGKILL else ""
    return f"rank {rank} was ended by signal {number}{memory}"


def _check_gpus(device: str, ranks: int) -> None:
    """Raises ConfigError where ranks would have to share GPUs; one error for all, before they start."""
    if device == "cpu":
        return
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks:
        raise ConfigError(
            f"{ranks} ranks need as many GPUs, and this machine has {gpus}. Compare on the CPU with run.device=cpu, or under "
            "torchrun on several machines"
        )


def check(config: RunConfig, args: argparse.Namespace) -> int:
    """Compare on this rank, one of those torchrun started; rank 0 tells what was found."""
    from nemohybrid.parallel import world
    from nemohybrid.train.parity import compare
    from nemohybrid.train.run import join, say, shown_cut
    from nemohybrid.train.trainer import use_threads

    context = join(config)
    with _in_plain_words(context):
        use_threads(config.train.threads)
        say(context, introduction(config, context, args.steps), *shown_cut(config, context))
        comparison = compare(config, context, args.steps)
        say(context, *table(comparison, args.top), *verdict(comparison, context, config, args))
        world.stop()
    return 1 if comparison.faults(args.tolerance) else 0


@contextmanager
def _in_plain_words(context: "ParallelContext") -> Iterator[None]:
    """Raises TrainingError for what torch says when memory runs out or a peer is gone."""
    from nemohybrid.train.plain_words import lost_a_peer, ran_out_of_memory

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if ran_out_of_memory(error):
            raise TrainingError(f"out of memory on rank {context.rank} ({context.device}). {SHRINK}") from error
        if lost_a_peer(error):
            raise TrainingError(
                f"rank {context.rank} lost its peers. The rank that failed first says why; where rank 0 only was slow alone, "
                f"raise cluster.timeout_minutes. What was heard here: {error}"
            ) from error
        raise
