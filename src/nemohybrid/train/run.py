"""A run from the outside: agree, build, resume, train, say where everything is."""

from pathlib import Path

import torch

from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.yaml import config_yaml
from nemohybrid.errors import ConfigError
from nemohybrid.observe.accounting import total_cost
from nemohybrid.parallel.collectives import gather_bytes
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.symbols import parse_pattern
from nemohybrid.train.callbacks import standard
from nemohybrid.train.trainer import Trainer, use_threads


def run(config: RunConfig, context: ParallelContext) -> Trainer:
    """Train to the end of `config`, or to `train.stop_at`. Only rank 0 writes and prints."""
    check_agreement(config, context)
    use_threads(config.train.threads)
    torch.manual_seed(config.run.seed + context.rank)
    folder = Path(config.run.dir)
    say = print if context.is_main else _silent
    if context.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    say(_introduction(config, context), flush=True)
    trainer = Trainer(config, context, standard(config, context.is_main))
    for note in trainer.resume():
        say(note, flush=True)
    if context.is_main:  # only now: a refused resume must not change what the folder says about itself
        (folder / "config.yaml").write_text(config_yaml(config))
    trainer.fit()
    say(_conclusion(trainer, folder), flush=True)
    return trainer


def check_agreement(config: RunConfig, context: ParallelContext) -> None:
    """Every rank must have composed what rank 0 composed. Raises ConfigError on all ranks otherwise."""
    digests = gather_bytes(bytes.fromhex(config.digest()), context.data, context.device)
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise ConfigError(
            f"ranks {different} composed another configuration than rank 0. "
            "All must start with the same command, configs/ folder and code"
        )


def _silent(*_: object, **__: object) -> None:
    """What ranks other than 0 say."""


def _introduction(config: RunConfig, context: ParallelContext) -> str:
    cost = total_cost(config.model, config.data.sequence_length)
    pattern = parse_pattern(config.model.pattern)
    return (
        f"{config.model.name}: {pattern.main} ({pattern.num_layers} layers), {cost.parameters:,} parameters"
        f"{f', {cost.active:,} active' if cost.active != cost.parameters else ''}\n"
        f"{config.train.steps} steps of {config.train.global_batch} x {config.data.sequence_length} tokens, "
        f"{config.model.dtype} on {context.world_size} x {context.device.type}, run folder {config.run.dir}"
    )


def _conclusion(trainer: Trainer, folder: Path) -> str:
    evaluation = trainer.last_evaluation
    lines = [f"done: step {trainer.step} of {trainer.config.train.steps}"]
    if evaluation:
        lines.append(f"held-out text: {evaluation.val_bits_per_byte:.3f} bits per byte (step {evaluation.step})")
    known = {
        "checkpoints": folder / "checkpoints",
        "metrics": folder / "metrics.jsonl",
        "loss curve": folder / "loss.png",
        "samples": folder / "samples.txt",
        "configuration": folder / "config.yaml",
    }
    lines += [f"  {what:14}{path}" for what, path in known.items() if path.exists()]
    return "\n".join(lines)
