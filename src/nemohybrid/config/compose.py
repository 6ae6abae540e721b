"""Hydra composition: `configs/` + overrides -> a frozen `RunConfig`, or one error that lists everything wrong.

Hydra's compose API is used rather than `hydra.main`, which makes output folders and configures logging; both would
happen once per rank under torchrun. `hydra.main` serves only `--cfg`, `--help` and `-m` (see `cli/train.py`).
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemohybrid.config.check import build
from nemohybrid.config.derive import derive_sizes, derive_vocabulary
from nemohybrid.config.groups import configs_dir
from nemohybrid.config.overrides import usable_overrides
from nemohybrid.config.required import as_violations, register_resolver, without_required
from nemohybrid.config.rules import violated_rules
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.secrets import secrets_looked_up
from nemohybrid.config.violation import Violation, raise_all
from nemohybrid.errors import ConfigError

ABSENT_DATA = ("data.train", "train.evaluate_every")
"""What rules complain of where there is no data. It says nothing where a refused word would have named some."""


def register_schema() -> None:
    """Tell Hydra the types of every key, under the name the root config starts from, and what `${required:...}` means."""
    ConfigStore.instance().store(name="schema", node=RunConfig)
    register_resolver()


def load_config(overrides: Sequence[str], world_size: int = 1, *, unseen: Collection[str] = ()) -> RunConfig:
    """Compose, check and freeze. `ConfigError` lists every violation: unknown keys, bad values and broken rules together.

    unseen: "files", "packages", where only the nodes of the run have them: they are not looked for.
    """
    return _load(overrides, world_size, model_only=False, unseen=unseen)


def load_model_config(overrides: Sequence[str]) -> RunConfig:
    """Like `load_config`, checking only the rules of the model: for commands that look at it and train nothing."""
    return _load(overrides, 1, model_only=True)


def _load(overrides: Sequence[str], world_size: int, *, model_only: bool, unseen: Collection[str] = ()) -> RunConfig:
    violations: list[Violation] = []
    words = [str(o.input_line) for o in usable_overrides(overrides, violations)]
    try:
        cfg = compose_raw(words)
    except ConfigError as error:
        raise_all([*violations, Violation("composition", str(error))])
        raise
    return finish(cfg, world_size, violations, model_only=model_only, unseen=unseen)


def compose_raw(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """Hydra's own composition of `train.yaml` with overrides; its errors become `ConfigError`."""
    register_schema()
    try:
        with initialize_config_dir(str(config_dir or configs_dir()), version_base="1.3", job_name="nemohybrid"):
            return compose("train", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_plain(error)) from None


def _plain(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(
        line for line in lines if line and not line.startswith(("full_key", "object_type", "reference_type"))
    )


def finish(
    cfg: DictConfig,
    world_size: int,
    violations: list[Violation] | None = None,
    *,
    model_only: bool = False,
    unseen: Collection[str] = (),
) -> RunConfig:
    """Turn a composed config into a frozen `RunConfig`: typed, sizes filled in, every rule checked."""
    violations = [] if violations is None else violations
    if told := secrets_looked_up(OmegaConf.to_container(cfg, resolve=False)):
        raise_all([*violations, *told])  # what else is wrong would show values
    try:
        values, absent = without_required(cfg)
    except OmegaConfBaseException as error:
        raise_all([*violations, Violation("composition", _plain(error))])
        raise
    absent = {key: why for key, why in absent.items() if not model_only or key.startswith("model.")}
    violations.extend(as_violations(absent))
    config = build(RunConfig, values, violations)
    derive_vocabulary(config)
    derive_sizes(config.model)
    found = violated_rules(config, world_size, model_only=model_only, unseen=unseen)
    violations.extend(v for v in found if _is_sure(v, violations, absent))
    raise_all(violations)
    config.freeze()
    return config


def _is_sure(found: Violation, refused: list[Violation], absent: dict[str, str]) -> bool:
    """Whether a broken rule would still be broken had nothing been refused and everything required been given."""
    if any(v.where.lstrip("+").startswith(("data", "experiment")) for v in refused) and found.where in ABSENT_DATA:
        return False
    return not absent or found.where in ABSENT_DATA
