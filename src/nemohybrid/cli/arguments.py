"""What several commands read from their command line and surroundings."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from nemohybrid.config.ranks import fewest_data_ranks
from nemohybrid.errors import ConfigError

NO_CORPUS = (
    "data.bundled=shakespeare",
    "data.train=null",
    "data.valid=null",
    "data.split=[]",
    "train.evaluate_every=0",
)
"""Satisfies the rules about data. Nothing is read."""


def without_files(words: Sequence[str]) -> list[str]:
    """The overrides with what satisfies the rules about files in front, where they name none themselves: to plan, not to run."""
    named = any(word.lstrip("+").startswith(("data=", "data.train=", "data.bundled=")) for word in words)
    return ["init_from=null", *(() if named else NO_CORPUS), *words]


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
