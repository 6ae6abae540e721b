"""The callbacks of a configuration, in the order in which they must run."""

from nemohybrid.config.run_config import RunConfig
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.callbacks.canary import KernelCanary
from nemohybrid.train.callbacks.checkpoint import Checkpoint
from nemohybrid.train.callbacks.evaluate import Evaluate
from nemohybrid.train.callbacks.experts import ExpertMap
from nemohybrid.train.callbacks.memory import Memory
from nemohybrid.train.callbacks.metrics_file import MetricsFile
from nemohybrid.train.callbacks.output_norms import MeasureOutputNorms
from nemohybrid.train.callbacks.picture import Picture
from nemohybrid.train.callbacks.position_loss import PositionPicture
from nemohybrid.train.callbacks.precision_health import PrecisionHealth
from nemohybrid.train.callbacks.progress import Progress
from nemohybrid.train.callbacks.samples import Samples
from nemohybrid.train.callbacks.stragglers import Stragglers
from nemohybrid.train.callbacks.tensorboard import TensorBoard
from nemohybrid.train.callbacks.throughput import Throughput
from nemohybrid.train.callbacks.wandb import WandB


def standard(config: RunConfig, is_main: bool) -> list[Callback]:
    """First what may end the run before it begins, then what measures, what writes (rank 0 only), and what acts on every rank."""
    measure: list[Callback] = [KernelCanary(), Throughput(), Memory()]
    if config.logging.output_norms:
        measure.append(MeasureOutputNorms(config.logging.output_norms))
    if config.logging.precision_every and is_main:
        measure.append(PrecisionHealth(config.logging.precision_every))
    if is_main:
        measure.append(Stragglers())
    return measure + (_writers(config) if is_main else []) + _actors(config)


def _writers(config: RunConfig) -> list[Callback]:
    chosen = [
        (True, MetricsFile()),
        (config.logging.tensorboard, TensorBoard()),
        (config.logging.wandb, WandB()),
        (True, Progress(config.logging.console, config.logging.every)),
        (config.logging.picture, Picture()),
        (config.train.evaluate_positions, PositionPicture()),
        (config.logging.expert_map_every > 0, ExpertMap(config.logging.expert_map_every)),
    ]
    return [callback for wanted, callback in chosen if wanted]


def _actors(config: RunConfig) -> list[Callback]:
    save: list[Callback] = [
        Checkpoint(config.checkpoint.every)
    ]  # first: a run that dies while it scores has lost nothing
    score: list[Callback] = [Evaluate()] if config.train.evaluate_every else []
    return save + score + ([Samples()] if config.sample.prompts else [])
