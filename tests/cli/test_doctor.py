"""`nemohybrid doctor`: which recipe runs how on this machine, and exactly why where not."""

import torch

from nemohybrid.precision.backends import BACKENDS, choose
from nemohybrid.precision.recipe import RECIPES


def cells(out: str) -> dict[str, list[str]]:
    """Recipe -> what its row says: of each backend, and whom auto takes."""
    rows = (line.replace(" (", "(").split() for line in out.splitlines())
    return {row[0]: row[1:] for row in rows if row and row[0] in RECIPES}


def test_every_recipe_has_a_row_that_says_what_choosing_does(nemohybrid):
    code, out, _ = nemohybrid("doctor", "--device", "cpu")
    assert code == 0
    found, cpu = cells(out), torch.device("cpu")
    assert list(found) == [name for name, recipe in RECIPES.items() if recipe.is_quantized]
    for name, (*said, auto) in found.items():
        can = [backend.obstacle(RECIPES[name], cpu) is None for backend in BACKENDS.values()]
        assert [word == "yes" for word in said] == can
        assert auto == choose(RECIPES[name], "auto", cpu).name


def test_every_reason_is_written_once_and_in_full(nemohybrid):
    """The numbers in the table are those of the reasons below it."""
    _, out, _ = nemohybrid("doctor", "--device", "cpu")
    reasons = dict(line.split(" ", 1) for line in out.splitlines() if line.startswith("("))
    cited = {f"({word.split('(')[1]}" for row in cells(out).values() for word in row if word.startswith("no(")}
    assert set(reasons) == cited
    assert len(set(reasons.values())) == len(reasons)
    engine, native, _, _ = cells(out)["mxfp8"]
    assert reasons[engine.removeprefix("no")] == "Transformer Engine runs on NVIDIA GPUs only"
    assert reasons[native.removeprefix("no")].startswith("torch multiplies MXFP8 from compute capability 10.0 on")


def test_versions_and_the_device_are_named(nemohybrid):
    _, out, _ = nemohybrid("doctor", "--device", "cpu")
    assert f"torch {torch.__version__}" in out
    assert "CPU: " in out
    assert "no transformer_engine" in out or "transformer_engine 2" in out


def test_a_gpu_is_described_and_asked(nemohybrid, monkeypatch):
    """One that refuses everything: what it says is passed on."""

    class Properties:
        name, total_memory = "NVIDIA H200", 141 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    code, out, _ = nemohybrid("doctor")
    assert code == 0
    assert "GPU: NVIDIA H200, 141 GiB, compute capability 7.5" in out
    assert "FP8 from compute capability 8.9 on (Ada, Hopper), it has 7.5" in out
    assert cells(out)["fp8_current"][-1] == "emulated"


def test_a_gpu_that_is_not_there_is_an_error(nemohybrid, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = nemohybrid("doctor", "--device", "cuda")
    assert code == 1
    assert "sees no GPU" in err
