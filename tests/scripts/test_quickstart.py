"""scripts/quickstart.sh around its training: with a compiler, without one, and on a GPU. Python is a stand-in."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/usr/bin/env bash
case "$*" in
  -) cat >/dev/null; echo "4 bfloat16 $DEVICE" ;;
  "-m nemohybrid_kernels.cpp") echo "a page of the compiler's" >&2; echo "asked to build"; exit "$STATUS" ;;
  *"nemohybrid train"*) echo "$OMP_NUM_THREADS threads: $*" ;;
esac
"""


@pytest.fixture
def quickstart(tmp_path):
    """Runs the script in an environment that is there already."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(PYTHON)
    (tmp_path / "bin/python").chmod(0o755)
    checksum = subprocess.check_output(["cksum"], input=(ROOT / "pyproject.toml").read_bytes()).decode().strip()
    (tmp_path / "nemohybrid-installed").write_text(f"base {checksum} {ROOT}\n")

    def run(device: str, status: int) -> subprocess.CompletedProcess[str]:
        own = {"NEMOHYBRID_VENV": str(tmp_path), "DEVICE": device, "STATUS": str(status)}
        without = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        command = ["bash", str(ROOT / "scripts/quickstart.sh"), "train.steps=3"]
        return subprocess.run(command, env=without | own, capture_output=True, text=True, timeout=60, check=False)

    return run


TRAINS = "4 threads: -m nemohybrid train experiment=quickstart model.dtype=bfloat16 train.steps=3\n"
WITHOUT = "training without C++ kernels; python -m nemohybrid_kernels.cpp says why they cannot be built here\n"


@pytest.mark.parametrize(
    ("device", "status", "output"),
    [
        ("cpu", 0, f"asked to build\n{TRAINS}"),
        ("cpu", 1, f"asked to build\n{WITHOUT}{TRAINS}"),
        ("cuda", 1, TRAINS),
    ],
    ids=["a compiler", "none", "a GPU"],
)
def test_it_trains_whether_kernels_can_be_built_or_not(quickstart, device, status, output):
    done = quickstart(device, status)
    assert (done.returncode, done.stdout, done.stderr) == (0, output, "")
