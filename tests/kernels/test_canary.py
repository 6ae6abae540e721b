"""What the kernel canary sees: faults as kernels have had them, planted in the twin of the scan."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scan_inputs import scan_inputs
from torch import Tensor

from nemohybrid_kernels import machine
from nemohybrid_kernels.canary import ALLOWED, Case, KernelMismatch, check
from nemohybrid_kernels.ssd import ssd_scan

CPU = torch.device("cpu")
LENGTH = 150


def twin(**given: Tensor) -> Tensor:
    return ssd_scan(**given, backend="torch")[0]


def case(run=twin, dtype=torch.bfloat16, reference=twin) -> Case:
    draw = partial(scan_inputs, L=LENGTH, H=4, P=16, N=16, dtype=dtype, documents=True, state=False)
    return Case("ssd_scan", "triton", "4 heads of 16", draw, run, reference)


class Scaled(torch.autograd.Function):
    """Passes x on, and multiplies its gradient: a backward pass that is wrong by itself."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * ctx.factor, None


def with_gradient(name: str, factor, **given: Tensor) -> Tensor:
    factor = torch.as_tensor(factor).to(given[name].dtype)
    return twin(**given | {name: Scaled.apply(given[name], factor)})


def places(low: int, high: int, there: float) -> Tensor:
    """[1, L, 1]: 1, and `there` at tokens low to high."""
    factor = torch.ones(1, LENGTH, 1)
    factor[:, low:high] = there
    return factor


def one_tile_is_zero(**given: Tensor) -> Tensor:
    y = twin(**given)
    return y * F.pad(torch.zeros(1, 16, 1, 1, dtype=y.dtype), (0, 0, 0, 0, 64, LENGTH - 80), value=1.0)


def one_entry_is_nan(**given: Tensor) -> Tensor:
    y = twin(**given).clone()
    y[1, 77, 2, 3] = torch.nan
    return y


def one_entry_is_off(**given: Tensor) -> Tensor:
    """By little of the whole."""
    y = twin(**given).clone()
    y[1, 77, 2, 3] += 0.06 * y.detach().abs().max()
    return y


def every_entry_is_off(**given: Tensor) -> Tensor:
    """By less than a single one may be."""
    y = twin(**given)
    return y + 0.75 * ALLOWED[y.dtype] * y.detach().abs().max()


def documents_leak(document_ids: Tensor, **given: Tensor) -> Tensor:
    return twin(document_ids=torch.where(torch.arange(LENGTH) < 64, document_ids, document_ids[:, 63:64]), **given)


def no_skip(D: Tensor, **given: Tensor) -> Tensor:
    return twin(D=D.detach(), **given)


def one_token_short(**given: Tensor) -> Tensor:
    return twin(**given)[:, :-1]


def raises(**given: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: an illegal instruction was encountered\nmore lines")


FAULTS = {
    "a tile that was not written": (one_tile_is_zero, "output is off by"),
    "one NaN": (one_entry_is_nan, "output holds NaN or infinity in 1 of"),
    "one wrong entry": (one_entry_is_off, "output is off by .* of its largest entry"),
    "many entries that are a little wrong": (every_entry_is_off, "output is off by .* of its norm"),
    "documents that leak": (documents_leak, "output is off by"),
    "a gradient that is half of what it should be": (partial(with_gradient, "dt", 0.5), "gradient of dt is off by"),
    "a gradient with the wrong sign in the last chunk": (
        partial(with_gradient, "B", places(128, LENGTH, -1.0).unsqueeze(3)),
        "gradient of B is off by",
    ),
    "a gradient that is a tenth too large": (partial(with_gradient, "A", 1.1), "gradient of A is off by"),
    "a gradient with infinities": (partial(with_gradient, "x", torch.inf), "gradient of x holds NaN or infinity"),
    "no gradient": (no_skip, "no gradient of D"),
    "another shape": (one_token_short, r"output has shape \[2, 149, 4, 16\], not \[2, 150, 4, 16\]"),
    "an exception": (raises, "it raised RuntimeError: CUDA error: an illegal instruction was encountered$"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault, dtype):
    run, words = FAULTS[fault]
    with pytest.raises(KernelMismatch, match=f"^ssd_scan triton: 4 heads of 16: .*{words}"):
        check(case(run, dtype), CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("chunk_size", [16, 128])
def test_other_orders_of_rounding_and_summing_are_no_fault(dtype, chunk_size):
    check(case(partial(twin, chunk_size=chunk_size), dtype), CPU)


def test_all_wrong_tensors_are_named():
    with pytest.raises(
        KernelMismatch, match=r"output is off by .*; gradient of x is off by .*; gradient of C is off by"
    ):
        check(case(lambda **given: twin(**given) * 1.5), CPU)


def test_random_numbers_of_the_run_are_left_alone():
    before = torch.get_rng_state()
    check(case(), CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_too_little_memory_is_no_mismatch():
    def too_large(**given: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        check(case(too_large), CPU)


def test_a_machine_is_another_after_any_change_of_what_decides_the_code(monkeypatch):
    before = machine.machine(CPU)
    assert before == machine.machine(CPU)
    assert {"device", "torch", "kernels"} <= before.keys()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setattr(machine, "version", lambda package: "9.9")
    monkeypatch.setattr(machine, "sources", lambda: "f" * 64)
    now = machine.machine(CPU)
    assert {name for name in now if now[name] != before.get(name)} == {"torch", "kernels", *machine.PACKAGES}


def test_a_gpu_of_the_same_make_is_another_machine_and_one_of_another_driver_too(monkeypatch):
    def seen(uuid: str, driver: str) -> dict[str, str]:
        gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, uuid=uuid)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        monkeypatch.setattr(machine, "_driver", lambda: driver)
        return machine.machine(torch.device("cuda"))

    first = seen("a", "580.1")
    assert first["device"] == "NVIDIA H200 (9.0)"
    assert first == seen("a", "580.1")
    assert first != seen("b", "580.1")
    assert first != seen("a", "580.2")


def test_the_interpreter_is_another_machine(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreted = machine.machine(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert interpreted != machine.machine(CPU)


def test_the_sources_are_all_of_the_package(monkeypatch, tmp_path):
    (tmp_path / "ssd").mkdir()
    files = [tmp_path / "machine.py", tmp_path / "ssd/configs.json", tmp_path / "ssd/fast.cpp"]
    for file in files:
        file.write_text("1")
    monkeypatch.setattr(machine, "__file__", str(files[0]))
    hashes = {machine.sources.__wrapped__()}
    for file in files:
        file.write_text("2")
        hashes.add(machine.sources.__wrapped__())
    (tmp_path / "ssd/notes.txt").write_text("no code")
    hashes.add(machine.sources.__wrapped__())
    assert len(hashes) == 1 + len(files)


def test_two_cases_of_one_name_are_the_same():
    assert case().name == replace(case(), run=raises).name
    assert case().name != replace(case(), backend="mamba_ssm").name
