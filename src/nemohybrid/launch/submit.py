"""Handing a script over: to a program that reads it, or to a shell that this process becomes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import NoReturn

from nemohybrid.errors import ConfigError


def hand_to(command: list[str], text: str, outvoting: Mapping[str, str]) -> int:
    """Give `text` to a program on its standard input; returns its exit status. Raises ConfigError where it is not installed.

    outvoting: variables that the program is not shown, which says why: they would win over options in `text`.
    """
    _must_be_there(command[0])
    for variable, option in outvoting.items():
        print(
            f"{variable} of this shell is left out: --{option} is the script's to decide", file=sys.stderr, flush=True
        )
    environment = {name: value for name, value in os.environ.items() if name not in outvoting}
    return subprocess.run(command, input=text, text=True, check=False, env=environment).returncode


def become(text: str) -> NoReturn:
    """Run a script in place of this process, so that signals and the exit status are its own."""
    _must_be_there("bash")
    sys.stdout.flush()
    os.execvp("bash", ["bash", "-c", text])


def _must_be_there(program: str) -> None:
    if shutil.which(program) is None:
        raise ConfigError(f"there is no {program} on PATH here. --dry-run prints what it would be given")
