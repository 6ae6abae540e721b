"""What is started, where, and with how many ranks: the same for every launcher."""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError


@dataclass(frozen=True)
class Job:
    """A run on `nodes` x `gpus_per_node` ranks. command: the command line that asked for it, without `--dry-run`."""

    command: str
    overrides: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    name: str
    run_dir: str
    python: str
    save_seconds: int
    setup: str | None = None
    on_gpus: bool = True

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        return self.nodes * self.gpus_per_node


def checked_config(words: Sequence[str], nodes: int, gpus_per_node: int, unseen: Collection[str] = ()) -> RunConfig:
    """The configuration that every rank would compose, by the project's own rules, before anything waits in a queue.

    unseen: what only the nodes have, as for `load_config`. Raises ConfigError for flags, and with every broken rule.
    """
    if flags := [word for word in words if word.startswith("-")]:
        raise ConfigError(f"{flags[0]} behind -- is no override. A launch is one run; its own options stand before --")
    with _as_on_a_node(gpus_per_node):
        return load_config(words, nodes * gpus_per_node, unseen=unseen)


@contextmanager
def _as_on_a_node(ranks: int) -> Iterator[None]:
    """Rules about nodes read the variable that launchers set there."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    try:
        yield
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
        if before is not None:
            os.environ["LOCAL_WORLD_SIZE"] = before
