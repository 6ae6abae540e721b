"""Composing configurations that should work, and reading the complaint about those that should not."""

from collections.abc import Callable

import pytest

from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError


@pytest.fixture
def compose() -> Callable[..., RunConfig]:
    """`compose("model=tiny", ...)`: on the bundled text, so that only what a test says can be wrong."""
    return lambda *overrides, world_size=1: load_config(["data=shakespeare", *overrides], world_size)


@pytest.fixture
def complaint(compose) -> Callable[..., str]:
    """`complaint("model=tny", ...)`: the message of the ConfigError, which there must be."""

    def message(*overrides: str, world_size: int = 1) -> str:
        with pytest.raises(ConfigError) as caught:
            compose(*overrides, world_size=world_size)
        return str(caught.value)

    return message
