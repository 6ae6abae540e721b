"""How much memory weights take on their way: in a process of its own, with a model of twelve equal layers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = Path(__file__).parent / "fixtures" / "peak_memory.py"


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, float]:
    """MB at the peak of each action above what the process had before; `model` and `layer` in MB."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is measured on Linux")
    give_freed_memory_back = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(MEASURE), str(tmp_path_factory.mktemp("weights"))],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | give_freed_memory_back,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("action", ["loading", "importing"])
def test_reading_takes_the_model_and_about_a_layer(action, peaks):
    """Found: a layer and 1 MB above the model; pages of the mapped file."""
    above = peaks[action] - peaks["model"]
    assert above < 2 * peaks["layer"], (
        f"{action} took {above:.0f} MB above the model; a layer is {peaks['layer']:.0f} MB"
    )


@pytest.mark.parametrize("action", ["saving", "exporting"])
def test_writing_takes_about_a_layer(action, peaks):
    """From a model in memory, and from a checkpoint without one. Found: 2 MB, and 1.3 layers."""
    taken = peaks[action]
    assert taken < 2 * peaks["layer"], f"{action} took {taken:.0f} MB; a layer is {peaks['layer']:.0f} MB"
