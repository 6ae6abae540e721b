"""`nemohybrid parity OVERRIDE...`: does this layout compute what one rank computes, on this machine?"""

import argparse
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nemohybrid.cli.initial_model import with_initial_model
from nemohybrid.config.compose import compose_raw, load_config
from nemohybrid.config.overrides import usable_overrides
from nemohybrid.config.ranks import shard_ranks
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError, Stopped, TrainingError

if TYPE_CHECKING:
    from nemohybrid.parallel.context import ParallelContext
    from nemohybrid.train.parity import Comparison

NOTHING_TO_COMPARE = 2
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2}
"""Shares of the largest entry of a tensor, by compute dtype; docs/parity.md says why."""
MANY = 4
"""Tensor ranks; more of them add more summands, and get five times that."""
BATCH_PER_RANK = 2
"""Sequences of each data rank: the fewest that make two microbatches, whose gradients must add up."""
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
  torchrun --nproc-per-node 8 -m nemohybrid parity model=nemotron_h_8b 'model.pattern="M-M*-"' parallel.tensor=4

Overrides are those of `train`. What is not given of batch, length and optimizer is small here, whatever an experiment
says: rows of 64 tokens, two microbatches of one row on every data rank.

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
        type=_count,
        help="processes to start; default: parallel.tensor x parallel.data, or x 2 where that is auto",
    )
    p.add_argument("--dtype", choices=tuple(TOLERANCES), default="float32", help="instead of model.dtype")
    p.add_argument(
        "--tolerance",
        type=_share,
        help="largest error, as a share of the largest entry of a tensor; default: 1e-5, with bfloat16 5e-2, as sums of "
        "parts are rounded; five times that with more than 4 tensor ranks",
    )
    p.add_argument("--steps", type=_count, default=3, help="optimizer steps (default 3)")
    p.add_argument("--top", type=_count, default=10, help="rows of the table of the worst tensors (default 10)")
    return p


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


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
    started = _started_ranks(args.ranks)
    config, ranks = composed(completed(with_initial_model(args.overrides), args.dtype), started or args.ranks)
    many = 5 if config.parallel.tensor > MANY else 1
    args.tolerance = args.tolerance or many * TOLERANCES[args.dtype]
    if ranks == 1:
        print(_NOTHING)
        return NOTHING_TO_COMPARE
    return check(config, ranks, args) if started else launch(argv, config, ranks)


_NOTHING = (
    "parity: one rank and no layout, there is nothing to compare. Ask for a layout, e.g. parallel.tensor=2, or for ranks "
    "that share the batch, e.g. --ranks 2"
)


def _started_ranks(asked: int | None) -> int | None:
    """How many ranks torchrun has started; None without it."""
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"the environment variable WORLD_SIZE={text} is no number of processes; torchrun sets it")
    if asked is not None and asked != int(text):
        raise ConfigError(f"--ranks {asked}: torchrun has started {text} processes already; leave --ranks out")
    return int(text)


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
    data = int(layout.data) if str(layout.data).isdecimal() else max(1, ranks // others) if ranks else 2
    ranks = ranks or others * max(1, data)
    batch = BATCH_PER_RANK * max(1, data) * microbatch
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


def check(config: RunConfig, ranks: int, args: argparse.Namespace) -> int:
    """Compare on this rank, one of those torchrun started; rank 0 tells what was found."""
    from nemohybrid.parallel import context as world
    from nemohybrid.train.parity import compare
    from nemohybrid.train.run import check_agreement
    from nemohybrid.train.trainer import use_threads

    cluster, layout = config.cluster, config.parallel
    sizes = layout.tensor, shard_ranks(config, ranks), layout.sequence
    context = world.start(config.run.device, cluster.backend, cluster.timeout_minutes, *sizes)
    with _in_plain_words(context):
        check_agreement(config, context)
        use_threads(config.train.threads)
        _say(context, introduction(config, context, args.steps))
        comparison = compare(config, context, args.steps)
        _say(context, *table(comparison, args.top), *verdict(comparison, context, config, args))
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


def _say(context: "ParallelContext", *lines: str) -> None:
    """Rank 0 speaks for all."""
    for line in lines if context.is_main else ():
        print(line, flush=True)


def introduction(config: RunConfig, context: "ParallelContext", steps: int) -> str:
    """Model, layout and work in one line."""
    model, train = config.model, config.train
    return (
        f"parity: {model.name} ({model.pattern}) under {described(config, context)} against one rank, {steps} steps of "
        f"{train.global_batch} x {config.data.sequence_length} tokens, {model.dtype} on "
        f"{context.world_size} x {context.device.type}"
    )


def described(config: RunConfig, context: "ParallelContext") -> str:
    """`tensor 2 (sequence parallel) x data 2 (full_shard)`."""
    tensor, data, shard = context.tensor.size, context.data.size, context.shard.size
    mode = config.parallel.data_mode if shard > 1 else "replicate"
    copies = f", {data // shard} copies of {shard} ranks" if 1 < shard < data else ""
    axes = [f"tensor {tensor}{' (sequence parallel)' * context.sequence}"] if tensor > 1 else []
    return " x ".join([*axes, *([f"data {data} ({mode}{copies})"] if data > 1 else [])])


def table(comparison: "Comparison", top: int) -> Iterator[str]:
    """Losses and norms side by side, and the tensors that are farthest off."""
    from nemohybrid.train.parity import off_by

    yield f"{'':28}{'layout':>12}{'one rank':>12}{'difference':>12}"
    for name, (got, wanted) in comparison.numbers.items():
        yield f"{name:28}{got:>12.6g}{wanted:>12.6g}{off_by(got, wanted):>12.1e}"
    yield f"{'error':>10}{'largest entry':>15}  gradients of step 1 and weights after the last; errors as shares"
    for one in comparison.worst()[:top]:
        yield f"{one.relative:>10.1e}{one.scale:>15.1e}  {one.name}"


def verdict(
    comparison: "Comparison", context: "ParallelContext", config: RunConfig, args: argparse.Namespace
) -> Iterator[str]:
    """One line where all is well; else the first faults and what to do."""
    worst, faults, tolerance = comparison.worst()[0].relative, comparison.faults(args.tolerance), args.tolerance
    compared = f"{len(comparison.tensors)} tensors compared, worst {worst:.1e}, tolerance {tolerance:.0e}"
    if not faults:
        yield f"{compared}: the layout equals one rank"
        return
    yield f"{compared}: the layout does NOT equal one rank, {len(faults)} fault{'s' * (len(faults) > 1)}:"
    yield from (f"  {fault}" for fault in faults[: args.top])
    yield from [f"  and {len(faults) - args.top} more; --top shows more of them"] if len(faults) > args.top else []
    yield "What to do:"
    yield from (f"  - {line}" for line in advice(context, config, worst, tolerance))


def advice(context: "ParallelContext", config: RunConfig, worst: float, tolerance: float) -> Iterator[str]:
    """What may be the reason, and how to find out."""
    model, data, tensor = config.model, context.data.size, context.tensor.size
    experts = "E" in model.pattern
    if experts and model.router.aux_loss == "global" and data > 1:
        yield "compare with model.router.aux_loss=sequence: with global, data ranks know other loads (docs/moe.md)"
    if model.dtype != "float32":
        others = ", and chooses among experts of nearly equal scores" if experts else ""
        yield f"compare with --dtype float32: where that passes, it is {model.dtype}, which rounds sums of parts{others}"
        return
    if tolerance < worst < 10 * tolerance:
        yield f"it may be rounding, as faults are mostly 1e-2 and more: compare with --tolerance {10 * tolerance:.0e}"
    smaller = [*["parallel.sequence=false"] * context.sequence, *["parallel.tensor=1"] * (tensor > 1)]
    smaller += ["parallel.data_mode=replicate"] if context.shard.size > 1 else []
    yield f"see which part it is: {', '.join([*smaller, 'fewer symbols in model.pattern'])}"
    yield "do not train with this layout before that is known; please report it with this output"
