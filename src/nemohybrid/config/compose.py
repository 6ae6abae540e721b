"""Hydra composition: `configs/` + overrides -> a frozen `RunConfig`, or one error that lists everything wrong.

Hydra's compose API is used rather than `hydra.main`, which makes output folders and configures logging; both would
happen once per rank under torchrun. `hydra.main` serves only `--cfg`, `--help` and `-m` (see `cli/train.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import nemohybrid
from nemohybrid.config.check import alternatives, build, find_field, is_section, value_problem
from nemohybrid.config.derive import derive_sizes
from nemohybrid.config.rules import violated_rules
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.violation import Violation, raise_all
from nemohybrid.errors import ConfigError, did_you_mean


def configs_dir() -> Path:
    """The folder of config groups: inside the installed package, or at the top of a checkout."""
    package = Path(nemohybrid.__file__).parent
    for folder in (package / "configs", package.parent.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"configs/ is neither in {package} nor two folders above it: the installation is incomplete")


def register_schema() -> None:
    """Tell Hydra the types of every key, under the name the root config starts from."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def groups() -> dict[str, list[str]]:
    """Config groups and their options, as found in `configs/`."""
    return {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml"))
        for folder in sorted(configs_dir().iterdir())
        if folder.is_dir()
    }


def load_config(overrides: Sequence[str], world_size: int = 1) -> RunConfig:
    """Compose, check and freeze. `ConfigError` lists every violation: unknown keys, bad values and broken rules together."""
    return _load(overrides, world_size, model_only=False)


def load_model_config(overrides: Sequence[str]) -> RunConfig:
    """Like `load_config`, checking only the rules of the model: for commands that look at it and train nothing."""
    return _load(overrides, 1, model_only=True)


def _load(overrides: Sequence[str], world_size: int, *, model_only: bool) -> RunConfig:
    violations: list[Violation] = []
    good = [o for o in parse_overrides(overrides) if not unusable(o, violations)]
    try:
        cfg = compose_raw([o.input_line or "" for o in good])
    except ConfigError as error:
        raise_all([*violations, Violation("composition", str(error))])
        raise
    return finish(cfg, world_size, violations, model_only=model_only)


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
    cfg: DictConfig, world_size: int, violations: list[Violation] | None = None, *, model_only: bool = False
) -> RunConfig:
    """Turn a composed config into a frozen `RunConfig`: typed, sizes filled in, every rule checked."""
    violations = [] if violations is None else violations
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_plain(error)) from None
    config = build(RunConfig, values, violations)
    derive_sizes(config.model)
    violations.extend(violated_rules(config, world_size, model_only=model_only))
    raise_all(violations)
    config.freeze()
    return config


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's grammar; a word it cannot read is a `ConfigError` that shows the word."""
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"cannot read the override: {_plain(error)}") from None


def unusable(override: Override, violations: list[Violation]) -> bool:
    """Whether the override is unusable; if so, why is appended to `violations`."""
    key = override.key_or_group
    if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
        return False
    message = _group_problem(override) if _is_group_choice(override) else _key_problem(override)
    if message:
        violations.append(Violation(str(override.input_line), message))
    return bool(message)


def _is_group_choice(override: Override) -> bool:
    return "/" in override.key_or_group or override.key_or_group.split("@")[0] in groups()


def _group_problem(override: Override) -> str:
    options = groups().get(override.key_or_group)
    if options is None:
        return f"unknown config group {override.key_or_group!r}" + did_you_mean(override.key_or_group, groups())
    if override.is_delete() or override.is_sweep_override():
        return ""
    chosen = override.value()
    names = chosen if isinstance(chosen, list) else [chosen]
    unknown = [str(n) for n in names if n is not None and str(n) not in options]
    if not unknown:
        return ""
    return f"there is no {override.key_or_group} {unknown[0]!r}{did_you_mean(unknown[0], options)} Known: {', '.join(options)}"


def _key_problem(override: Override) -> str:
    field, annotation, complaint = find_field(RunConfig, override.key_or_group)
    if complaint or field is None or override.is_delete() or override.is_sweep_override():
        return complaint
    value = override.value()
    if isinstance(value, str) and value.startswith("${"):
        return ""
    if is_section(annotation):
        if not isinstance(value, dict):
            return "is a section, not a value"
        inside: list[Violation] = []
        build(annotation, value, inside, f"{override.key_or_group}.")
        return "; ".join(f"{v.where}: {v.message}" for v in inside)
    if isinstance(value, int | float) and str in alternatives(annotation):
        value = str(value)  # as OmegaConf does: run.dir=2026
    problem = value_problem(field, annotation, value)
    return problem and problem[0].lower() + problem[1:]
