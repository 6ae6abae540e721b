"""The table of configurations, and launches that are recorded instead of started."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from nemohybrid_kernels import launching
from nemohybrid_kernels.launching import Config, config_for, launch, recording

CPU = torch.device("cpu")
ENTRIES = [
    {"when": {"dtype": "fp32"}, "tiles": {"ROWS": 16}, "warps": 4, "stages": 1},
    {"when": {"N": [129, 256]}, "tiles": {"ROWS": 32}, "warps": 4, "stages": 2},
    {"tiles": {"ROWS": 64}, "warps": 8, "stages": 3},
]


@pytest.fixture
def table(monkeypatch):
    """Of one kernel, `toy`; on sm_80 there is only the first entry."""
    table = {"sm_80": {"toy": ENTRIES[:1]}, "sm_90": {"toy": ENTRIES}, "sm_100": {"toy": ENTRIES}}
    monkeypatch.setattr(launching, "table", lambda: table)


def kernel(name="toy"):
    return SimpleNamespace(__name__=name)


@pytest.mark.parametrize(
    "facts, rows",
    [
        ({"dtype": "fp32", "N": 200}, 16),
        ({"dtype": "bf16", "N": 129}, 32),
        ({"dtype": "bf16", "N": 256}, 32),
        ({"dtype": "bf16", "N": 128}, 64),
        ({"dtype": "bf16", "N": 257}, 64),
    ],
)
def test_the_first_entry_whose_conditions_are_met_is_taken(table, facts, rows):
    assert config_for("toy", CPU, **facts).tiles == {"ROWS": rows}


def test_a_call_that_no_entry_fits_is_an_error_that_names_it(table):
    with recording(80), pytest.raises(LookupError, match=r"no configuration of toy for \{'dtype': 'bf16', 'N': 1\}"):
        config_for("toy", CPU, dtype="bf16", N=1)


def test_a_recorded_launch_keeps_its_arguments_and_its_place_in_the_table(table):
    given = torch.empty(4, 8, dtype=torch.bfloat16, device="meta")
    with recording(90) as found:
        config = config_for("toy", CPU, dtype="bf16", N=200)
        launch(kernel(), (7,), config, x=given, n=3)
        launch(kernel("other"), (1,), Config({}, 1, 1), x=given, y=given.float())
    assert [(it.kernel.__name__, it.grid, it.entry) for it in found] == [("toy", (7,), 1), ("other", (1,), None)]
    assert found[0].arguments == {"x": given, "n": 3}
    assert found.entries == {"toy": [1]}
    assert [it.tensor_bytes for it in found] == [4 * 8 * 2, 4 * 8 * 2 + 4 * 8 * 4]


def test_what_is_recorded_runs_only_when_asked_to(table):
    started = []

    class Kernel(SimpleNamespace):
        def __getitem__(self, grid):
            return lambda **arguments: started.append((grid, sorted(arguments)))

    def start():
        launch(Kernel(__name__="toy"), (2,), Config({"ROWS": 16}, 4, 1), x=torch.empty(1))

    with recording(90) as quiet:
        start()
    assert started == []
    with recording(90, runs=True) as running:
        start()
    assert started == [((2,), ["ROWS", "enable_fp_fusion", "num_stages", "num_warps", "x"])]
    assert (len(quiet), len(running)) == (1, 1)


def test_a_recording_within_another_ends_where_it_began(table):
    with recording(90) as outer:
        with recording(80) as inner:
            assert launching.architecture(CPU) == 80
            launch(kernel(), (1,), Config({}, 1, 1))
        assert launching.architecture(CPU) == 90
    assert (len(outer), len(inner)) == (0, 1)
    assert launching.architecture(CPU) == 90, "without a GPU it is that of Hopper"


def test_every_architecture_has_every_kernel_and_ends_with_an_entry_for_all_calls():
    table = launching.table()
    assert list(table) == ["sm_80", "sm_90", "sm_100"]
    for kernels in table.values():
        assert kernels.keys() == table["sm_90"].keys()
        for name, entries in kernels.items():
            assert 1 <= len(entries) <= 3, f"{name}: {len(entries)} configurations"
            assert "when" not in entries[-1], f"{name}: some calls have no configuration"


def test_a_launch_says_whether_products_and_sums_are_fused():
    """Triton's default changes with its version, and 3.9 warns of it."""
    assert launching.compiler_options(Config({}, 8, 2)) == {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}


def test_what_speaks_against_triton_is_said_device_first(monkeypatch):
    monkeypatch.setattr(launching, "TRITON", False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "needs a CUDA device" in (launching.obstacle(CPU) or "")
    for device, interpreted in ((CPU, "1"), (torch.device("cuda"), "0")):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        assert launching.obstacle(device) == "Triton is not installed; pip install 'nemohybrid[gpu]'"
    assert "bfloat16 and float32, not float16" in (launching.obstacle(CPU, torch.float16) or "")


@pytest.mark.parametrize("capability, words", [((7, 5), "compute capability 8.0, this GPU has 7.5"), ((8, 0), None)])
def test_gpus_before_ampere_are_too_old(monkeypatch, capability, words):
    monkeypatch.setattr(launching, "TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = launching.obstacle(torch.device("cuda"))
    assert found is None if words is None else words in (found or "")


def test_no_call_looks_for_triton_in_the_file_system(monkeypatch):
    def refuse(name):
        raise AssertionError(f"looked for {name}")

    monkeypatch.setattr(importlib.util, "find_spec", refuse)
    monkeypatch.setattr(launching, "find_spec", refuse)
    monkeypatch.setattr(launching, "TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launching.obstacle(CPU) is None


@pytest.mark.parametrize(
    "capability, column", [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 3), 100), ((12, 0), 80)], ids=str
)
def test_a_gpu_takes_the_column_of_its_generation_and_an_unknown_one_the_smallest_tiles(
    capability, column, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launching.architecture(torch.device("cuda")) == column


def test_a_grid_of_nothing_starts_nothing():
    """CUDA refuses it, and the interpreter does not mind."""

    class Kernel:
        def __getitem__(self, grid):
            raise AssertionError(f"started over {grid}")

    launch(Kernel(), (4, 0), Config({}, warps=4, stages=1), x=torch.empty(0))
