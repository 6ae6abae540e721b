"""Every shipped configuration compiles for GPUs that are not here, and takes no more of them than there is.

Compiling needs a process without TRITON_INTERPRET. What it found is kept in the user's cache; nothing kept, two cores take
some 90 s.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from nemohybrid_kernels import ahead_of_time, launching
from nemohybrid_kernels.calls import CASES
from nemohybrid_kernels.shipped import TOLERATED

ROOT = Path(__file__).parents[2]
COMPILE = ROOT / "scripts" / "bench" / "compile_kernels.py"
PLANTED = ROOT / "tests" / "support" / "planted_kernels.py"
ON_GPUS = ROOT / "tests" / "support" / "gpu_code.py"


def run(*command, **environment):
    """In a process that can compile."""
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=without | environment, capture_output=True, text=True, check=False
    )


def compiled(folder, *options):
    """What compile_kernels.py says of each binary."""
    file = folder / "rows.json"
    done = run(COMPILE, "--json", file, *options)
    assert file.exists(), done.stderr
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """For all generations of GPUs."""
    return compiled(tmp_path_factory.mktemp("shipped"))


@pytest.fixture(scope="module")
def for_hopper(tmp_path_factory):
    """For the generation that most run on: a third of the time."""
    return compiled(tmp_path_factory.mktemp("hopper"), "--arch", 90)


@pytest.fixture(scope="module")
def page():
    """The script that renders the page, as `python scripts/bench/compile_kernels.py` finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(COMPILE.parent)
        yield importlib.import_module("kernels_resources_page")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    done = run(PLANTED, NEMOHYBRID_COMPILED=str(tmp_path_factory.mktemp("compiled")))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def of_the_page(page):
    """Whether this Triton is the one that the page was made with: each spills where others do not."""
    return f"Compiled by Triton {triton.__version__} " in page.PAGE.read_text(encoding="utf-8")


@pytest.mark.timeout(900)  # a machine slower than the one this was measured on, with nothing kept
@pytest.mark.parametrize("rows", ["for_hopper", pytest.param("shipped", marks=pytest.mark.slow)])
def test_no_shipped_kernel_spills_or_outgrows_its_gpu_or_lost_its_tensor_cores(rows, of_the_page, request):
    bad = [
        f"{row['kernel']} {row['sizes']} sm_{row['sm']} ({row['case']}): {fault}"
        for row in request.getfixturevalue(rows)
        for fault in row["faults"]
        if of_the_page or "spills" not in fault
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_excuse_for_a_spill_is_still_needed(shipped, of_the_page):
    used = {tuple(row["excuse"]) for row in shipped if row.get("excused")}
    assert not of_the_page or used == set(TOLERATED), (
        "TOLERATED in nemohybrid_kernels/shipped.py has what spills no more"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_of_resources_is_up_to_date(shipped, page, of_the_page):
    """With another Triton than that of the page, only what does not depend on it is compared."""
    written, rendered = page.PAGE.read_text(encoding="utf-8"), page.render(shipped)
    if not of_the_page:
        written, rendered = page.without_measurements(written), page.without_measurements(rendered)
    assert written == rendered, "python scripts/bench/compile_kernels.py --page writes it anew"


def test_measurements_and_nothing_else_are_left_out_for_another_triton(shipped, page):
    other = [
        row | {"triton": "3.6.0", "registers": row["registers"] + 1, "shared": row["shared"] + 1} for row in shipped
    ]
    assert page.render(other) != page.render(shipped)
    assert page.without_measurements(page.render(other)) == page.without_measurements(page.render(shipped))
    moved = [row | {"warps": row["warps"] * 2} for row in shipped]
    assert page.without_measurements(page.render(moved)) != page.without_measurements(page.render(shipped))


@pytest.mark.parametrize("architecture", launching.ARCHITECTURES)
def test_every_configuration_of_the_table_is_reached_by_a_shipped_case(architecture):
    reached = {
        (kernel, place)
        for case in CASES
        for kernel, places in case.launches(architecture).entries.items()
        for place in places
    }
    table = launching.table()[f"sm_{architecture}"]
    listed = {(kernel, place) for kernel, entries in table.items() for place in range(len(entries))}
    assert listed == reached, "a configuration that no case of nemohybrid_kernels/calls.py leads to"


@pytest.fixture(scope="module")
def on_gpus():
    done = run(ON_GPUS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_offsets_into_long_rows_are_multiplied_in_64_bits(on_gpus):
    found = on_gpus["narrow"]
    assert len(found) == 6
    assert not {kernel: names for kernel, names in found.items() if names}


def test_a_limit_of_time_steps_hides_nothing_that_is_no_number(on_gpus):
    """The minimum of a number and NaN is NaN in the interpreter, and the number on a GPU."""
    without_limit, with_limit = on_gpus["extremes"]
    assert with_limit == without_limit


@pytest.mark.parametrize("name", ["sound on 80", "sound on 90", "sound on 100"])
def test_a_sound_kernel_has_no_faults(planted, name):
    assert planted["faults"][name] == []


def test_a_product_without_wgmma_is_found(planted):
    assert planted["faults"]["two warps"] == ["its 1 products became no wgmma.mma_async"]


def test_a_spill_is_found(planted):
    (fault,) = planted["faults"]["too many registers"]
    assert fault.startswith("it spills registers: ")


def test_too_much_shared_memory_is_found(planted):
    assert (
        f"it takes {256 * 256 * 4} bytes of shared memory, of {99 * 1024}"
        in planted["faults"]["too much shared memory"]
    )


def test_what_was_compiled_once_is_not_compiled_again(planted):
    assert planted["again"] == planted["faults"]["two warps"]


def test_arguments_are_specialised_as_a_launch_would(planted):
    """A tensor off 16 bytes, one on them; the integers 1, 16, 3 and 2**40; a float, a bool, None."""
    names = ["t", "aligned", "one", "sixteen", "three", "wide", "real", "flag", "nothing", "SIZE"]
    types = ["*bf16", "*bf16", "constexpr", "i32", "i32", "i64", "fp32", "u1", "constexpr", "constexpr"]
    assert planted["signature"] == dict(zip(names, types, strict=True))
    assert planted["divisible"] == ["aligned", "sixteen", "wide"]


def test_under_the_interpreter_compiling_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (launch, *_) = CASES[0].launches(90)
    with pytest.raises(RuntimeError, match="cannot be compiled under TRITON_INTERPRET=1"):
        ahead_of_time.compile_launch(launch, 90)
