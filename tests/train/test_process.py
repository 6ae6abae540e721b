"""What a run asks of its process: a step's memory is kept for the next one, and many files may be open."""

import resource
import subprocess
import sys

import pytest

from nemohybrid.train.process import allow_many_files

STEPS = """
import ctypes, resource, sys
from nemohybrid.train.process import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def step():
    block = libc.malloc(16 * 2**20)
    ctypes.memset(block, 1, 16 * 2**20)
    libc.free(block)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an option of glibc")
def test_memory_of_a_step_is_not_taken_page_by_page_again():
    faults = {}
    for how in ("given back", "kept"):
        done = subprocess.run(
            [sys.executable, "-c", STEPS, how], capture_output=True, text=True, timeout=60, check=True
        )
        faults[how] = int(done.stdout)
    assert faults["kept"] < faults["given back"] / 10, "ten steps of 4096 pages: what the option is for"


def test_a_run_asks_its_process_for_both(start, monkeypatch):
    asked = []
    for name in ("keep_freed_memory", "allow_many_files"):
        monkeypatch.setattr(f"nemohybrid.train.run.{name}", lambda name=name: asked.append(name))
    start("train.steps=1")
    assert asked == ["keep_freed_memory", "allow_many_files"]


def test_as_many_files_as_the_system_allows_may_be_open():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        allow_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
