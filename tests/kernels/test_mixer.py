"""The middle of a Mamba-2 mixer as one operator, against its parts one after another in float64."""

from collections import Counter

import pytest
import torch

from nemohybrid_kernels import launching
from nemohybrid_kernels.errors import ShapeError
from nemohybrid_kernels.mixer import mamba2_mixer

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, WIDTH, GROUPS, STATE, TAPS = 2, 8, 1, 16, 4
INNER = HEADS * WIDTH
SIZES = {"heads": HEADS, "groups": GROUPS, "state": STATE, "group_size": 8, "eps": 1e-5, "chunk_size": 16}


def mixer_inputs(L=37, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    convolved = INNER + 2 * GROUPS * STATE
    shapes = {
        "zxbcdt": (1, L, INNER + convolved + HEADS),
        "conv_weight": (convolved, TAPS),
        "conv_bias": (convolved,),
        "dt_bias": (HEADS,),
        "A": (HEADS,),
        "D": (HEADS,),
        "norm_weight": (INNER,),
    }
    inputs = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    inputs["A"] = -inputs["A"].exp()
    return inputs | {"zxbcdt": inputs["zxbcdt"].to(dtype)}


def fused(document_ids=None, **inputs):
    how = {name: inputs.pop(name) for name in ("dt_limit", "recompute") if name in inputs}
    placed = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    ids = None if document_ids is None else document_ids.to(DEVICE)
    return (mamba2_mixer(**placed, **SIZES, **how, document_ids=ids, backend="triton").cpu(),)


def in_parts(**inputs):
    doubled = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items() if name != "dt_limit"}
    return (mamba2_mixer(**doubled, **SIZES, dt_limit=inputs.get("dt_limit"), backend="torch"),)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_values_and_all_gradients_equal_those_of_the_parts(documents, assert_same, results_and_gradients):
    inputs = mixer_inputs() | ({"document_ids": (torch.arange(37)[None] > 20).int()} if documents else {})
    assert_same(results_and_gradients(fused, inputs), results_and_gradients(in_parts, inputs), 1e-5)


def test_in_bf16_it_is_no_further_off_than_its_parts(results_and_gradients):
    """Roundings add up over four operators: what they may cost is what they cost the twin, and half as much again. The
    interpreter cuts bf16 off instead of rounding it: twice as far off, and always to the same side, so sums drift."""
    factor = 1.5 if torch.cuda.is_available() else 6.0
    inputs = mixer_inputs(dtype=torch.bfloat16)
    exact, got = results_and_gradients(in_parts, inputs), results_and_gradients(fused, inputs)
    twin = results_and_gradients(lambda **i: (mamba2_mixer(**i, **SIZES, backend="torch"),), inputs)
    assert got["out0"].dtype == torch.bfloat16
    for name, wanted in exact.items():
        error, allowed = ((some[name].double() - wanted).norm() / wanted.norm() for some in (got, twin))
        assert error <= factor * allowed + 1e-3, f"{name}: off by {error:.1e}, its parts by {allowed:.1e}"


def test_clamped_steps_and_missing_biases(assert_same, results_and_gradients):
    inputs = {name: t for name, t in mixer_inputs(L=20).items() if name not in ("conv_bias", "D")}
    absent = {"conv_bias": None, "D": None, "dt_limit": (0.3, 1.0)}

    def run(how):
        def call(**given):
            parameters = {name: t for name, t in absent.items() if name != "dt_limit"}
            moved = {name: t.to(DEVICE) if how == "triton" else t.double() for name, t in given.items()}
            return (mamba2_mixer(**moved, **parameters, **SIZES, dt_limit=(0.3, 1.0), backend=how).cpu(),)

        return call

    assert_same(results_and_gradients(run("triton"), inputs), results_and_gradients(run("torch"), inputs), 1e-5)


def test_what_it_keeps_is_what_it_says():
    """Whole activations that are saved: zxbcdt, which in_proj's consumer has anyway, and y; and unless they are made again
    what is convolved, and the states before 3 chunks."""

    def kept(recompute):
        inputs = {name: t.to(DEVICE).requires_grad_() for name, t in mixer_inputs().items()}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            mamba2_mixer(**inputs, **SIZES, recompute=recompute, backend="triton")
        return sorted(t.numel() for t in saved if t.dim() >= 3)

    least = [37 * INNER, mixer_inputs()["zxbcdt"].numel()]
    assert kept(recompute=True) == least
    assert kept(recompute=False) == sorted([*least, 37 * (INNER + 2 * GROUPS * STATE), 3 * INNER * STATE])


def test_the_backward_pass_makes_again_only_what_was_not_kept():
    from nemohybrid_kernels.mixer.triton import _mixer, _mixer_backward

    inputs = tuple(t.to(DEVICE) for t in mixer_inputs(L=20).values())
    sizes = (None, HEADS, GROUPS, STATE, 8, 1e-5, None, None, 16)

    def launched_backward(recompute):
        with launching.recording(90) as launches:
            out, *kept = _mixer(*inputs, *sizes, recompute)
            launches.clear()
            _mixer_backward(torch.empty_like(out), *kept, *inputs, *sizes)
        return Counter(launch.kernel.__name__ for launch in launches)

    assert launched_backward(recompute=False)["conv1d_backward"] == 1
    again = Counter(conv1d_forward=1, ssd_states=1)
    assert launched_backward(recompute=True) == launched_backward(recompute=False) + again


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_recomputing_changes_no_bit(documents, results_and_gradients):
    inputs = mixer_inputs() | ({"document_ids": (torch.arange(37)[None] > 20).int()} if documents else {})
    kept, again = (
        results_and_gradients(lambda how=how, **given: fused(recompute=how, **given), inputs) for how in (False, True)
    )
    assert kept.keys() == again.keys()
    for name, tensor in kept.items():
        assert torch.equal(again[name], tensor), name


def test_it_compiles_without_a_graph_break(results_and_gradients):
    inputs = mixer_inputs(L=20)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    got, want = results_and_gradients(compiled, inputs), results_and_gradients(fused, inputs)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_the_operators_hold_to_the_rules_of_torch():
    from nemohybrid_kernels.mixer.triton import _mixer
    from nemohybrid_kernels.ssd.triton.op import _scan

    inputs = {name: t.to(DEVICE).requires_grad_() for name, t in mixer_inputs(L=17).items()}
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*inputs.values(), None, HEADS, GROUPS, STATE, 8, 1e-5, None, None, 16)
    for recompute in (False, True):
        torch.library.opcheck(_mixer, (*arguments, recompute), test_utils=tests)
    x, dt = (torch.rand(shape, device=DEVICE, requires_grad=True) for shape in ((1, 17, 2, 4), (1, 17, 2)))
    B = torch.rand(1, 17, 1, 8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(_scan, (x, dt, -torch.ones(2, device=DEVICE), B, B, None, None, None, 16), test_utils=tests)


def test_channels_that_do_not_add_up_are_refused():
    inputs = mixer_inputs()
    with pytest.raises(
        ShapeError, match="zxbcdt has 65 channels, which 2 heads, 1 groups and a state of 16 cannot share"
    ):
        mamba2_mixer(**inputs | {"zxbcdt": inputs["zxbcdt"][..., :-1]}, **SIZES)
