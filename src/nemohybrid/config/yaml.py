"""Resolved configurations as files."""

from pathlib import Path

from omegaconf import OmegaConf

from nemohybrid.config.check import build
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.violation import Violation, raise_all


def config_yaml(config: RunConfig) -> str:
    """The whole resolved configuration; `read_config_yaml` takes it back."""
    values = {key: _plain(value) for key, value in config.as_dict().items()}
    return OmegaConf.to_yaml(OmegaConf.create(values))


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def read_config_yaml(path: Path) -> RunConfig:
    """A frozen configuration from a file that `config_yaml` wrote; types and keys are checked, rules are not."""
    violations: list[Violation] = []
    values = OmegaConf.to_container(OmegaConf.create(path.read_text()), resolve=False)
    config = build(RunConfig, values, violations)  # pyright: ignore[reportArgumentType]
    raise_all(violations)
    config.freeze()
    return config
