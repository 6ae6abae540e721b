"""Ranks that cannot meet: what torch says of it, with who, where, and what to look at."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from nemohybrid.errors import TrainingError

CAUSES = {
    "EADDRINUSE|address already in use": "Another program has the port. Give another MASTER_PORT, or with torchrun another "
    "port of --rdzv-endpoint",
    "waiting for clients": "The others did not come: look why in their output, and whether they reach this host at this port",
    "trying to connect|failed to connect|Connection refused": "Rank 0 is not there, or its host cannot be reached from here at "
    "this port: a name that only it knows, a firewall, or the wrong network interface",
    "Unable to find address for": "That network interface is not on this host: see GLOO_SOCKET_IFNAME",
    "environment variable (MASTER_ADDR|MASTER_PORT)": "Whoever sets WORLD_SIZE sets this too, as torchrun does",
}
"""What torch, gloo or NCCL say -> what a person can do."""


@contextmanager
def in_words_of_a_meeting() -> Iterator[None]:
    """Raises TrainingError in place of what torch raises while ranks meet."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise TrainingError(_told(error)) from error


def _told(error: Exception) -> str:
    rank, size, address, port = (os.environ.get(n, "?") for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    advice = next((f". {cause}" for words, cause in CAUSES.items() if re.search(words, str(error))), "")
    heard = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"rank {rank} on {socket.gethostname()} did not meet all {size} ranks at {address}:{port}{advice}. "
        f"What was heard here: {heard[0]}"
    )
