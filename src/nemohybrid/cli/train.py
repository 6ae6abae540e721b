"""`nemohybrid train OVERRIDE...`: compose the configuration, then train or resume."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemohybrid.cli.arguments import started_ranks
from nemohybrid.cli.initial_model import with_initial_model
from nemohybrid.config.compose import compose_raw, finish, load_config, register_schema
from nemohybrid.config.groups import configs_dir
from nemohybrid.config.overrides import usable_overrides
from nemohybrid.config.required import as_violations, without_required
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.violation import Violation, raise_all
from nemohybrid.errors import ConfigError, NemohybridError

HYDRA_FLAGS = ("--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i", "--resolve", "--package", "-p")
SWEEP_FLAGS = ("--multirun", "-m")
HYDRA_QUIET = (
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.dir=${run.dir}",
    "hydra.sweep.subdir=${hydra.job.num}",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
    "hydra.help.app_name='nemohybrid train'",
)


def main(argv: list[str]) -> int:
    """Flags of Hydra's own go to Hydra; everything else is composed here, without its output folders and logging."""
    world_size = started_ranks() or 1
    argv = with_initial_model(argv)
    if any(word in SWEEP_FLAGS for word in argv):
        if world_size > 1:
            raise ConfigError("-m cannot run under torchrun: a sweep starts one job after another, each with all ranks")
        return sweep(argv)
    if any(word.split("=")[0] in HYDRA_FLAGS for word in argv):
        return show(argv)
    return train(load_config(argv, world_size))


def show(argv: list[str]) -> int:
    """`--cfg job`, `--help` and their like, answered by Hydra."""
    _check_overrides(argv)
    if "--resolve" in argv:  # Hydra would print a traceback for what cannot be resolved
        raise_all(as_violations(without_required(compose_raw(_overrides(argv)))[1]))
    _hydra_main(lambda cfg: None, argv)
    return 0


def sweep(argv: list[str]) -> int:
    """`-m key=a,b ...`: every combination, one after the other, each in a folder of its own."""
    _check_overrides(argv)
    _hydra_main(_sweep_job, argv)
    return 0


def _sweep_job(cfg: Any) -> None:
    """One combination, in <run.dir>/<number>."""
    from hydra.core.hydra_config import HydraConfig

    info = HydraConfig.get()
    cfg.run.dir = str(Path(cfg.run.dir) / str(info.job.num))
    print(f"sweep job {info.job.num}: {' '.join(info.overrides.task)} -> {cfg.run.dir}", flush=True)
    try:
        status = train(finish(cfg, 1))
    except NemohybridError as error:  # Hydra would print a traceback
        print(f"sweep job {info.job.num}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if status:  # stopped by a signal, and the jobs after it too
        raise SystemExit(status)


def _overrides(argv: list[str]) -> list[str]:
    return [word for word in argv if not word.startswith("-") and ("=" in word or word.startswith("~"))]


def _check_overrides(argv: list[str]) -> None:
    violations: list[Violation] = []
    for override in usable_overrides(_overrides(argv), violations):
        if override.key_or_group == "run.dir" and override.is_sweep_override():
            message = "a sweep gives every job a folder below run.dir; sweep over something else"
            violations.append(Violation(str(override.input_line), message))
    raise_all(violations)


def _hydra_main(job: Callable[[Any], None], argv: list[str]) -> None:
    """Hydra reads sys.argv, and wants all overrides side by side."""
    import hydra

    register_schema()
    overrides = _overrides(argv)
    flags = [word for word in argv if word not in overrides]
    saved, sys.argv = sys.argv, ["nemohybrid train", *HYDRA_QUIET, *overrides, *flags]
    try:
        hydra.main(config_path=str(configs_dir()), config_name="train", version_base="1.3")(job)()
    finally:
        sys.argv = saved


def train(config: RunConfig) -> int:
    """Run a checked configuration in this process, one of the ranks of the job; returns the exit status."""
    from nemohybrid.train.signals import StopSignals, exit_status

    with StopSignals() as signals:  # before the imports that take seconds
        from nemohybrid.parallel import world
        from nemohybrid.train.run import join, run

        parallel = join(config)
        trainer = run(config, parallel, signals, world.stop)
    return exit_status(trainer.stopped_by)
