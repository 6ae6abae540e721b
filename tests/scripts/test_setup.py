"""scripts/_setup.sh, run with a stand-in for python that writes down what it was asked to do."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINNED = "torch==2.13.0"

# Answers the questions that _setup.sh asks; `state` is the folder in which a test arranges the answers.
FAKE_PYTHON = """#!/bin/bash
state={state}
here=$(dirname "$0")
case "$*" in
  "-c import sys, venv"*) [ ! -e "$state/too_old" ] ;;
  "-c from importlib"*) cat "$here/torch" "$state/machine_torch" 2>/dev/null | head -n 1 ;;
  "-c "*) ;;
  --version) echo "Python 3.9.2" ;;
  "-m venv "*) echo "$*" >>"$state/log"; mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install "*)
    echo "$*" >>"$state/log"
    [ ! -e "$state/offline" ] || exit 1
    case "$*" in *{pinned}) echo "2.13.0+cpu" >"$here/torch" ;; esac ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""

USE_SETUP = """
set -euo pipefail
source "$1/scripts/_setup.sh"
setup_environment "$2"
echo "python is $(command -v python)"
"""


class FakeMachine:
    """A clone, and a machine whose only pythons are stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.state, self.clone, self.bin = folder / "state", folder / "clone", folder / "bin"
        for new in (self.state, self.clone, self.bin):
            new.mkdir()
        shutil.copytree(ROOT / "scripts", self.clone / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", self.clone)
        for name in ("python3", "python", "python3.11", "python3.12"):
            python = self.bin / name
            python.write_text(FAKE_PYTHON.format(state=self.state, pinned=PINNED))
            python.chmod(0o755)

    def set_up(self, extra: str = "base", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", USE_SETUP, "bash", str(self.clone), extra],
            cwd=self.state,
            env={"PATH": f"{self.bin}:/usr/bin:/bin", **environment},
            text=True,
            capture_output=True,
            timeout=60,
        )

    def commands(self) -> list[str]:
        """The venv and pip commands since the last call, in order."""
        log = self.state / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_a_bare_machine_gets_torch_first_and_then_nemohybrid(machine):
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    make_venv, torch, ours = machine.commands()
    assert make_venv == f"-m venv {machine.clone}/.venv"
    assert torch.endswith(f" {PINNED}")
    assert ours.endswith("torch-constraint.txt -e .")
    assert (machine.clone / ".venv/torch-constraint.txt").read_text() == "torch==2.13.0+cpu\n"
    assert done.stdout.endswith(f"python is {machine.clone}/.venv/bin/python\n"), (
        "the environment must come first in PATH"
    )


def test_a_torch_that_is_there_is_kept_exactly(machine):
    (machine.state / "machine_torch").write_text("2.11.0a0+a6c236b9fd.nv26.3\n")
    assert machine.set_up().returncode == 0
    make_venv, ours = machine.commands()
    assert "--system-site-packages" in make_venv
    assert PINNED not in ours
    assert (machine.clone / ".venv/torch-constraint.txt").read_text() == "torch==2.11.0a0+a6c236b9fd.nv26.3\n"


def test_a_second_run_installs_nothing(machine):
    machine.set_up("base")
    machine.set_up("dev")
    first = machine.commands()
    assert first[-1].endswith("-e .[dev]")
    for extra in ("base", "dev"):
        assert machine.set_up(extra).returncode == 0
    assert machine.commands() == []


def test_changed_dependencies_are_installed(machine):
    machine.set_up()
    machine.commands()
    with (machine.clone / "pyproject.toml").open("a") as file:
        file.write("# one more\n")
    machine.set_up()
    assert [command.split()[2] for command in machine.commands()] == ["install"]


def test_an_installation_that_failed_is_tried_again(machine):
    (machine.state / "offline").touch()
    assert machine.set_up().returncode != 0
    (machine.state / "offline").unlink()
    machine.commands()
    assert machine.set_up().returncode == 0
    assert any(PINNED in command for command in machine.commands())


def test_a_python_that_is_too_old_is_named(machine):
    (machine.state / "too_old").touch()
    done = machine.set_up()
    assert done.returncode == 1
    assert "needs Python 3.11 or 3.12" in done.stderr
    assert "python3: Python 3.9.2" in done.stderr
    assert machine.commands() == []


def test_the_folder_of_the_environment_can_be_chosen(machine):
    assert machine.set_up(NEMOHYBRID_VENV="elsewhere/env").returncode == 0
    assert (machine.state / "elsewhere/env/bin/python").exists(), "a relative folder counts from where one stands"
    assert not (machine.clone / ".venv").exists()
