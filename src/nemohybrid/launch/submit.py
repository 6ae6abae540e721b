"""Handing a script over: to a program that reads it, or to a shell that this process becomes."""

import os
import shutil
import subprocess
import sys
from typing import NoReturn

from nemohybrid.errors import ConfigError


def hand_to(command: list[str], text: str) -> int:
    """Give `text` to a program on its standard input; returns its exit status. Raises ConfigError where it is not installed."""
    _must_be_there(command[0])
    return subprocess.run(command, input=text, text=True, check=False).returncode


def become(text: str) -> NoReturn:
    """Run a script in place of this process, so that signals and the exit status are its own."""
    _must_be_there("bash")
    sys.stdout.flush()
    os.execvp("bash", ["bash", "-c", text])


def _must_be_there(program: str) -> None:
    if shutil.which(program) is None:
        raise ConfigError(f"there is no {program} on PATH here. --dry-run prints what it would be given")
