"""At which learning rate does a model stop learning? The same short run for every arm, rate and seed (`nemohybrid sweep-lr`).

The experiment of arXiv 2410.16682 and of Wortsman et al. 2023 (arXiv 2309.14322): what norms and caps are worth shows at
rates that no one would train with. A cell is one run; its record is one JSON file, and a cell with a record is not run again.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError, TrainingError
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.callbacks.output_norms import PREFIX, MeasureOutputNorms
from nemohybrid.train.initial import load_initial_weights
from nemohybrid.train.signals import StopSignals
from nemohybrid.train.state import model_tensors
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer

_QK = "model.attention.qk_norm=true"
_V = "model.attention.v_norm=true"
_CAP = "model.attention.softcap=50"
_BC, _X = "model.mamba_bc_norm=true", "model.mamba_x_norm=true"

ARMS: Mapping[str, tuple[str, ...]] = {
    "baseline": (),
    "softcap": (_CAP,),
    "qk_norm": (_QK,),
    "qk_norm_cap": (_QK, _CAP),
    "qkv_norm": (_QK, _V, 'model.no_input_norm="*"'),
    "qk_fc_norm": (_QK, 'model.output_norm="*-"'),
    "fc_norm": ('model.output_norm="-"',),
    "proj_fc_norm": ('model.output_norm="*-"',),
    "m_bc_norm": (_BC,),
    "m_bcx_norm_noprenorm": (_BC, _X, 'model.no_input_norm="M"'),
    "m_output_norm": ('model.output_norm="M"',),
    "m_dt_limit": ("model.dt_limit=[0.0,1.0]",),
    "all_norms": (_QK, _BC, 'model.output_norm="M*-"'),
}
"""Name -> overrides: the arms of arXiv 2410.16682, parts of the last of them, the analogous ones for `M`, and all together."""

UNIGRAM_STEPS = 20
"""Batches in which the frequencies of tokens are counted."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file: another for every other rate, however near."""
        short = f"{self.lr:g}"
        return f"{self.arm}_lr{short if float(short) == self.lr else repr(self.lr)}_seed{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """What to run, and where. `arms`: name -> overrides; `measure_every`: steps between two looks at the outputs."""

    overrides: Sequence[str]
    arms: Mapping[str, Sequence[str]]
    lrs: Sequence[float]
    seeds: int
    steps: int
    output: Path
    measure_every: int = 10

    def cells(self) -> Iterator[tuple[Cell, RunConfig]]:
        """Every run with its configuration, one seed after the other, so that an unfinished sweep has all arms and rates.

        Raises ConfigError, before the first run, for whatever is wrong in any arm.
        """
        for seed in range(self.seeds):
            for lr in self.lrs:
                for arm, base in self.bases.items():
                    cell = Cell(arm, lr, base.run.seed + seed)
                    yield cell, self.config_of(cell, base)

    @cached_property
    def bases(self) -> Mapping[str, RunConfig]:
        """Name -> configuration of each arm, without rate, seed and folder. Raises ConfigError as `cells` does."""
        bases = self.compose(self.arms)
        same: dict[str, str] = {}
        for arm, base in bases.items():
            first = same.setdefault(settings_digest(base), arm)
            if first != arm:
                raise ConfigError(f"arms {first} and {arm} come to the same settings: comparing them shows nothing")
        return bases

    def compose(self, arms: Mapping[str, Sequence[str]]) -> dict[str, RunConfig]:
        """Raises ConfigError naming every arm that is wrong, those with the same fault together."""
        found: dict[str, RunConfig] = {}
        faults: dict[str, list[str]] = {}
        for arm, overrides in arms.items():
            try:
                found[arm] = load_config([*self.overrides, *overrides, f"train.steps={self.steps}"])
            except ConfigError as error:
                faults.setdefault(str(error), []).append(arm)
        if faults:
            raise ConfigError("\n".join(f"arm {', '.join(names)}: {fault}" for fault, names in faults.items()))
        return found

    def config_of(self, cell: Cell, base: RunConfig) -> RunConfig:
        """What the cell trains. The folder is taken as it is, not as a word of Hydra's, where `,` `(` `=` `$` mean something."""
        run = replace(base.run, seed=cell.seed, dir=str(self.output))
        data = replace(base.data, cache=str(self.output / "data"))
        config = replace(base, run=run, data=data, optim=replace(base.optim, lr=cell.lr))
        config.freeze()
        return config


def run_cells(sweep: Sweep, context: ParallelContext, signals: StopSignals) -> int:
    """Run every cell that has no record yet; returns the signal that stopped it, or 0.

    Raises ConfigError, before the first run, for a record that was made with other settings.
    """
    cells = list(sweep.cells())
    check_records(sweep)
    for number, (cell, config) in enumerate(cells, 1):
        file = sweep.output / "cells" / f"{cell.name}.json"
        if file.is_file():
            continue
        record = run_cell(cell, config, context, signals, sweep.measure_every)
        if record is None:
            return signals.received
        _write(file, record)
        end = record["failure"].partition("\n")[0] or f"loss {record['losses'][-1]:.3f}"
        print(f"{number}/{len(cells)}  {cell.name}: {end}  ({record['seconds']:.0f} s)", flush=True)
    return 0


def _write(file: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: a record that is there says that the cell is done."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record))
    part.replace(file)


def check_records(sweep: Sweep) -> None:
    """Raise ConfigError if any record was made with other settings, whether its rate and seed are asked for again or not.

    The report has them all in one table. Of an arm of one's own that is not named again only its file is known.
    """
    folder = sweep.output / "cells"
    records = {file: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    absent = {record["arm"] for record in records.values()} - sweep.arms.keys()
    try:
        bases = {**sweep.bases, **sweep.compose({arm: ARMS[arm] for arm in ARMS if arm in absent})}
    except ConfigError as error:
        raise ConfigError(
            f"{folder} was made with other settings: these do not allow an arm of it. Give another --output\n{error}"
        ) from None
    for file, record in records.items():
        cell = Cell(record["arm"], record["lr"], record["seed"])
        if cell.arm in bases and record["settings"] != settings_digest(sweep.config_of(cell, bases[cell.arm])):
            raise ConfigError(
                f"{file} was made with other settings. Take those back, give another --output, or delete it"
            )


def settings_digest(config: RunConfig) -> str:
    """SHA-256 of everything that decides the outcome of a cell: the configuration without its folders."""
    values = config.as_dict()
    del values["run"]["dir"], values["data"]["cache"]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


class _Losses(Callback):
    """The loss of every step, and the output norms of those that were measured."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: dict[int, dict[str, Any]] = {}

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Keep them."""
        self.losses.append(float(f"{result.loss:.5g}"))
        norms = {key: values for key, values in result.metrics.items() if key.startswith(PREFIX)}
        if norms:
            self.norms[result.step] = {key.removeprefix(PREFIX): values for key, values in norms.items()}


def run_cell(
    cell: Cell, config: RunConfig, context: ParallelContext, signals: StopSignals, measure_every: int
) -> dict[str, Any] | None:
    """Train once, in memory: no checkpoint, no metrics file. The record as written to disk; None where a signal came."""
    started, kept = time.monotonic(), _Losses()
    trainer = Trainer(config, context, [MeasureOutputNorms(measure_every), kept])
    load_initial_weights(config, model_tensors(trainer.model, trainer.parameters), trainer.data.tokenizer)
    failure = ""
    try:
        trainer.fit(signals)
    except TrainingError as error:  # a step that is not finite: what the sweep is about
        failure = str(error)
    if trainer.stopped_by:
        return None
    return {
        "arm": cell.arm,
        "lr": cell.lr,
        "seed": cell.seed,
        "settings": settings_digest(config),
        "losses": kept.losses,
        "failure": failure,
        "unigram": unigram_entropy(trainer),
        "norms": kept.norms,
        "seconds": round(time.monotonic() - started, 2),
    }


def unigram_entropy(trainer: Trainer) -> float:
    """Nats a token of a model that knows how frequent each token is and nothing else, on the first batches of the run."""
    counts = torch.zeros(trainer.config.model.vocab_size or 0, dtype=torch.float64)
    for step in range(1, min(UNIGRAM_STEPS, trainer.config.train.steps) + 1):
        batch = trainer.data.batch(step)
        counts += batch.labels[batch.loss_mask > 0].bincount(minlength=len(counts)).cpu()
    return torch.special.entr(counts / counts.sum()).sum().item()
