"""A run from the outside: agree, build, resume, train, say where everything is."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from nemohybrid.checkpoint.world import World
from nemohybrid.config.accounting import total_cost
from nemohybrid.config.ranks import data_mode, microbatch
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.yaml import config_yaml
from nemohybrid.parallel import world
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.plan.axes import axes
from nemohybrid.plan.memory import check_fits
from nemohybrid.plan.pipeline import describe
from nemohybrid.symbols import parse_pattern
from nemohybrid.train.agreement import check_agreement
from nemohybrid.train.callbacks import standard
from nemohybrid.train.lock import only_job_in
from nemohybrid.train.meeting import in_words_of_a_meeting
from nemohybrid.train.plain_words import in_plain_words
from nemohybrid.train.precision import Resolved
from nemohybrid.train.process import allow_many_files, keep_freed_memory
from nemohybrid.train.random_streams import RandomStreams
from nemohybrid.train.signals import StopSignals, name_of
from nemohybrid.train.trainer import Trainer, use_threads
from nemohybrid.train.watch.activity import LEAVING
from nemohybrid.train.watch.watching import watched
from nemohybrid_kernels.backend import lines_of


def join(config: RunConfig) -> ParallelContext:
    """Meet the other ranks of the job, divided as the configuration says. Once a process; `parallel.world.stop` ends it.

    Raises ConfigError where ranks do not run the same, TrainingError where they do not meet.
    """
    _, _, ranks = world.world_from_environment()
    cluster, met = config.cluster, partial(check_agreement, config)
    with in_words_of_a_meeting():
        return world.start(config.run.device, cluster.backend, cluster.timeout_minutes, axes(config, ranks), met)


def run(
    config: RunConfig,
    context: ParallelContext,
    signals: StopSignals | None = None,
    leave: Callable[[], object] = lambda: None,
) -> Trainer:
    """Train to the end of `config`, to `train.stop_at`, or until one of `signals`. Only rank 0 writes and prints.

    leave: what parts this rank from the others at the end, where one may hang, too.

    Raises TrainingError for a run folder in use, too little memory, a rank that died, numbers that are not finite;
    CheckpointError for a run that cannot be resumed or saved; DataError for its data.
    """
    with in_plain_words(config, context):
        check_agreement(config, context)
        use_threads(config.train.threads)
        keep_freed_memory()
        allow_many_files()
        RandomStreams(context, config.run.seed).start()
        folder = Path(config.run.dir)
        signals = signals or StopSignals()
        with only_job_in(folder) as notes, watched(config, context, signals) as activity:
            warnings = World().together(lambda: check_fits(config, context))
            say(context, *notes, _introduction(config, context), *shown_cut(config, context))
            say(context, *warnings, *_for_benchmarks_only(config))
            trainer = Trainer(config, context, standard(config, context.is_main), activity)
            precision = Resolved(config, context.device)
            say(context, *lines_of(trainer.model.kernels), *precision.lines)
            say(context, *_describe_data(trainer), *trainer.resume())
            if not trainer.is_complete:
                _train(trainer, precision, folder, signals)
            activity.enter(LEAVING)
            leave()
    return trainer


def _train(trainer: Trainer, precision: Resolved, folder: Path, signals: StopSignals) -> None:
    context = trainer.context
    if context.is_main:  # only now: a refused resume must not change what the folder says about itself
        (folder / "config.yaml").write_text(config_yaml(trainer.config))
        (folder / "precision.json").write_text(precision.json)
        say(context, *trainer.checkpoints.space_warnings())
    trainer.fit(signals)
    say(context, _stopped(trainer) if trainer.stopped_by else _conclusion(trainer, folder))


def say(context: ParallelContext, *lines: str) -> None:
    """Rank 0 speaks for all."""
    for line in lines if context.is_main else ():
        print(line, flush=True)


def _describe_data(trainer: Trainer) -> list[str]:
    """What the whole run is made of, however far it goes today."""
    return trainer.data.describe(trainer.plan.samples_before(trainer.config.train.steps + 1))


def _stopped(trainer: Trainer) -> str:
    return (
        f"stopped by {name_of(trainer.stopped_by)} at step {trainer.step} of {trainer.config.train.steps}, "
        f"saved {trainer.save()}; the same command goes on from there"
    )


def _introduction(config: RunConfig, context: ParallelContext) -> str:
    cost = total_cost(config.model, config.data.sequence_length)
    pattern, layout = parse_pattern(config.model.pattern), described(config, context)
    return (
        f"{config.model.name}: {pattern.main} ({pattern.num_layers} layers), {cost.parameters:,} parameters"
        f"{f', {cost.active:,} active' if cost.active != cost.parameters else ''}\n"
        f"{config.train.steps} steps of {config.train.global_batch} x {config.data.sequence_length} tokens, "
        f"{config.model.dtype} on {context.world_size} x {context.device.type}{f', {layout}' if layout else ''}, "
        f"run folder {config.run.dir}"
    )


def described(config: RunConfig, context: ParallelContext) -> str:
    """How ranks share the work: `tensor 2 (sequence parallel) x data 2 (full_shard)`; nothing for a world of one."""
    tensor, data, shard = context.tensor.size, context.data.size, context.shard.size
    mode = data_mode(config.parallel) if shard > 1 else "replicate"
    copies = f", {data // shard} copies of {shard} ranks" if 1 < shard < data else ""
    axes = [f"tensor {tensor}{' (sequence parallel)' * context.sequence}"] if tensor > 1 else []
    axes += [f"pipeline {context.pipeline.size}"] if context.pipeline.size > 1 else []
    ways = f"attention by {context.ways.attention}, Mamba-2 by {context.ways.mamba}"
    axes += [f"context {context.context.size} ({ways})"] if context.context.size > 1 else []
    axes += [f"data {context.rows.size} ({mode}{copies})"] if data > 1 else []
    return " x ".join(axes) + _described_experts(context)


def shown_cut(config: RunConfig, context: ParallelContext) -> list[str]:
    """Where a pipeline cuts the model, and how long its ranks wait, by the modelled costs of the layers."""
    if context.pipeline.size == 1:
        return []
    data = context.rows.size
    return describe(config, config.train.global_batch // data // microbatch(config, data))


def _described_experts(context: ParallelContext) -> str:
    experts = context.experts
    if experts is None:
        return ""
    sizes = {"expert": experts.expert.size, "expert tensor": experts.tensor.size, "copies of": experts.data.size}
    return ", experts on " + " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)


def _for_benchmarks_only(config: RunConfig) -> list[str]:
    forced = config.model.router.force_balance and "E" in config.model.pattern
    return ["model.router.force_balance: experts do not learn what they are for. For benchmarks only"] if forced else []


def _conclusion(trainer: Trainer, folder: Path) -> str:
    evaluation = trainer.last_evaluation
    lines = [f"done: step {trainer.step} of {trainer.config.train.steps}"]
    if evaluation:
        lines.append(f"held-out text: {evaluation.val_bits_per_byte:.3f} bits per byte (step {evaluation.step})")
        lines += [f"  {name}: {score.val_bits_per_byte:.3f} bits per byte" for name, score in evaluation.sets.items()]
    known = {
        "checkpoints": folder / "checkpoints",
        "metrics": folder / "metrics.jsonl",
        "loss curve": folder / "loss.png",
        "samples": folder / "samples.txt",
        "configuration": folder / "config.yaml",
    }
    lines += [f"  {what:14}{path}" for what, path in known.items() if path.exists()]
    return "\n".join(lines)
