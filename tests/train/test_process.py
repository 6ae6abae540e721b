"""A step's memory is kept for the next one."""

import subprocess
import sys

import pytest

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
