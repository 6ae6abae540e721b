"""What several commands read from their command line and surroundings."""

import argparse
import os
from typing import Any

from nemohybrid.config.ranks import fewest_data_ranks
from nemohybrid.errors import ConfigError


def whole_number(text: str) -> int:
    """A type of argparse: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def data_ranks_for(layout: Any) -> int:
    """The fewest data ranks with which `parallel`, whose values nobody has checked yet, has room for all experts."""
    if min(layout.tensor, layout.expert, layout.expert_tensor or 1) < 1:
        return 1  # a rule will say so
    return fewest_data_ranks(layout)


def started_ranks() -> int | None:
    """How many ranks torchrun has started; None without it. Raises ConfigError for what cannot be its number."""
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"the environment variable WORLD_SIZE={text} is no number of processes; torchrun sets it")
    return int(text)
