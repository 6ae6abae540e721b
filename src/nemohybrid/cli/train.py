"""`nemohybrid train OVERRIDE...`: compose the configuration, then train or resume."""

import os
import sys
from pathlib import Path

from nemohybrid.config.compose import configs_dir, finish, load_config, parse_overrides, register_schema, unusable
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.violation import raise_all
from nemohybrid.errors import ConfigError

HYDRA_FLAGS = ("--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i", "--resolve", "--package", "-p")
SWEEP_FLAGS = ("--multirun", "-m")
HYDRA_QUIET = (
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.dir=${run.dir}",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
    "hydra.help.app_name='nemohybrid train'",
)


def main(argv: list[str]) -> int:
    """Flags of Hydra's own go to Hydra; everything else is composed here, without its output folders and logging."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if any(word in SWEEP_FLAGS for word in argv):
        if world_size > 1:
            raise ConfigError("-m cannot run under torchrun: a sweep starts one job after another, each with all ranks")
        return sweep(argv)
    if any(word.split("=")[0] in HYDRA_FLAGS for word in argv):
        return show(argv)
    train(load_config(argv, world_size))
    return 0


def show(argv: list[str]) -> int:
    """`--cfg job`, `--help` and their like, answered by Hydra."""
    _check_overrides(argv)
    _hydra_main(lambda cfg: None, argv)
    return 0


def sweep(argv: list[str]) -> int:
    """`-m key=a,b ...`: every combination, one after the other, each in a folder of its own."""
    _check_overrides(argv)

    def job(cfg) -> None:
        from hydra.core.hydra_config import HydraConfig

        info = HydraConfig.get().job
        if cfg.run.dir is None or not any(o.startswith("run.dir=") for o in info_overrides()):
            cfg.run.dir = str(Path(cfg.run.dir or f"runs/{cfg.run.name}") / f"{info.num}")
        print(f"sweep job {info.num}: {info.override_dirname} -> {cfg.run.dir}")
        train(finish(cfg, 1))

    def info_overrides() -> list[str]:
        from hydra.core.hydra_config import HydraConfig

        return list(HydraConfig.get().overrides.task)

    _hydra_main(job, argv)
    return 0


def _check_overrides(argv: list[str]) -> None:
    violations = []
    for override in parse_overrides([word for word in argv if not word.startswith("-") and "=" in word]):
        unusable(override, violations)
    raise_all(violations)


def _hydra_main(job, argv: list[str]) -> None:
    import hydra

    register_schema()
    saved = sys.argv
    sys.argv = ["nemohybrid train", *HYDRA_QUIET, *argv]
    try:
        hydra.main(config_path=str(configs_dir()), config_name="train", version_base="1.3")(job)()
    finally:
        sys.argv = saved


def train(config: RunConfig) -> None:
    """Run a checked configuration in this process, one of the ranks of the job."""
    from nemohybrid.parallel import context as world
    from nemohybrid.train.run import run

    parallel = world.start(config.run.device, config.cluster.backend, config.cluster.timeout_minutes)
    try:
        run(config, parallel)
    finally:
        world.stop()
