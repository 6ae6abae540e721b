"""The output projection and the loss in one: in PyTorch, and by Triton kernels, which are interpreted where there is no GPU.

They are held to log softmax of all logits in float64.
"""

from functools import partial
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemohybrid_kernels import launching
from nemohybrid_kernels.cross_entropy import backends, linear, linear_cross_entropy
from nemohybrid_kernels.errors import BackendError, ShapeError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "torch", "plain"]
CHUNKED = pytest.mark.parametrize("backend", BACKENDS[:2])
DTYPES = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)


@pytest.fixture(autouse=True)
def triton_or_skip(request):
    """Without Triton what needs it is left out."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        pytest.importorskip("triton")


def loss_inputs(T=37, D=24, W=300, V=None, dtype=torch.float32, master=torch.float32, seed=0):
    """Labels at both ends of the V columns; x [T, D] in `dtype`, the weight [W, D] in `master`."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V or W, (T,), generator=g)
    labels[:2] = torch.tensor([0, (V or W) - 1])[:T]
    weight = torch.randn(W, D, generator=g).bfloat16().to(master)
    return {"x": torch.randn(T, D, generator=g).to(dtype), "weight": weight, "labels": labels}


def oracle(x, weight, labels, columns=None):
    logits = (x @ weight.T)[:, :columns]
    return (-torch.log_softmax(logits, -1)[torch.arange(len(labels)), labels],)


def in_double(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def run(backend, **how):
    """On the device where the kernels run; inputs and results are on the CPU."""

    def call(**inputs):
        return (linear_cross_entropy(**{k: v.to(DEVICE) for k, v in inputs.items()}, backend=backend, **how).cpu(),)

    return call


@DTYPES
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [300, 257, 1], ids=["no padding", "padding", "one column"])
def test_losses_and_gradients_equal_log_softmax(V, backend, dtype, tolerance, assert_same, results_and_gradients):
    inputs = loss_inputs(V=V, dtype=dtype)
    got = results_and_gradients(run(backend, columns=V, chunk_tokens=16), inputs)
    assert got["out0"].dtype == got["d_weight"].dtype == torch.float32
    assert got["d_x"].dtype == dtype
    assert_same(got, results_and_gradients(partial(oracle, columns=V), in_double(inputs)), tolerance)
    assert not got["d_weight"][V:].any(), "padding learns"


@settings(max_examples=12, derandomize=True, deadline=None, database=None)
@given(T=st.integers(0, 7), V=st.integers(1, 40), padding=st.integers(0, 3), chunk=st.integers(1, 8))
def test_any_shape_equals_log_softmax(T, V, padding, chunk, assert_same, results_and_gradients):
    inputs = loss_inputs(T, 5, V + padding, V)
    want = results_and_gradients(partial(oracle, columns=V), in_double(inputs))
    for backend in BACKENDS[:2]:
        got = results_and_gradients(run(backend, columns=V, chunk_tokens=chunk), inputs)
        for name, tensor in got.items():
            assert torch.allclose(tensor.double(), want[name], rtol=2e-5, atol=2e-5), f"{name} of {backend} is off"


def test_columns_that_a_program_takes_in_several_steps(assert_same, results_and_gradients, monkeypatch):
    triton = pytest.importorskip("nemohybrid_kernels.cross_entropy.triton")
    monkeypatch.setattr(triton, "config_for", lambda *_, **__: launching.Config({"BLOCK": 64}, 1, 1))
    inputs = loss_inputs(T=5, W=210, V=200)
    want = results_and_gradients(partial(oracle, columns=200), in_double(inputs))
    assert_same(results_and_gradients(run("triton", columns=200), inputs), want, 2e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's
@CHUNKED
def test_huge_logits_neither_overflow_nor_lose_the_loss(backend, results_and_gradients):
    weight, x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3e38, 0.0], [-3e38, 1.0]])
    got = results_and_gradients(run(backend), {"x": x, "weight": weight, "labels": torch.tensor([0, 1])})
    assert torch.equal(got["out0"], torch.zeros(2))
    assert got["d_x"].isfinite().all()


@CHUNKED
def test_what_is_no_number_stays_visible(backend):
    inputs = loss_inputs(T=3)
    inputs["x"][1, 2] = torch.nan
    assert run(backend)(**inputs)[0].isnan().tolist() == [False, True, False]


@CHUNKED
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_gradient_of_the_weight_is_added_up_in_fp32(backend, master, assert_same, results_and_gradients):
    """64 chunks of one token: added in bf16, what the last of them have to say would be lost."""
    inputs = loss_inputs(T=64, V=8, W=8, dtype=torch.bfloat16, master=master)
    got = results_and_gradients(run(backend, chunk_tokens=1), inputs)
    assert got["d_weight"].dtype == master
    want = results_and_gradients(oracle, in_double(inputs))
    assert_same({"d": got["d_weight"]}, {"d": want["d_weight"]}, 5e-3 if DEVICE == "cuda" else 1e-2)


def losses_of_holders(x, weight, labels, cuts, backend):
    """Each holder's. Exchanges are played in rounds: what all bring to the first, then to the second, then the losses."""
    answers, losses = [], []
    for combine in (lambda brought: brought.amax(0), lambda brought: brought.sum(0), None):
        brought, losses = [], []
        for first, part in zip(accumulate([0, *cuts]), weight.split(cuts), strict=False):
            asked = []

            def exchange(tensor, asked=asked):
                asked.append(tensor.detach().clone())
                return answers[len(asked) - 1].clone() if len(asked) <= len(answers) else tensor

            how = {"largest": exchange, "total": exchange, "chunk_tokens": 5, "backend": backend}
            losses.append(linear_cross_entropy(x, part, labels, first=first, **how))
            brought.append(asked)
        if combine is not None:
            answers.append(combine(torch.stack([asked[len(answers)] for asked in brought])))
    return losses


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [[30, 21], [1, 50], [17, 17, 17]], ids=str)
def test_holders_of_columns_agree_on_the_loss_and_share_the_gradient(cuts, backend, assert_same):
    def losses_and_gradients(losses, *leaves):
        """Of all holders' losses: each makes its own part of the gradient."""
        slope = torch.linspace(-1, 1, 13, dtype=losses[0].dtype, device=losses[0].device)
        gradients = torch.autograd.grad(losses, leaves, [slope] * len(losses))
        return {name: t.cpu() for name, t in zip(("loss", "d_x", "d_weight"), (losses[0], *gradients), strict=True)}

    inputs = loss_inputs(T=13, W=51)
    x, weight, labels = (t.to(DEVICE).requires_grad_(t.is_floating_point()) for t in inputs.values())
    losses = losses_of_holders(x, weight, labels, cuts, backend)
    assert all(torch.equal(other, losses[0]) for other in losses)
    exact = [t.detach().cpu().double().requires_grad_() for t in (x, weight)]
    want = losses_and_gradients(oracle(*exact, labels.cpu()), *exact)
    assert_same(losses_and_gradients(losses, x, weight), want, 5e-6)


@CHUNKED
def test_a_holder_of_padding_alone_adds_nothing(backend):
    inputs = {name: value.to(DEVICE) for name, value in loss_inputs(T=4, W=8).items()}
    brought = []
    give = {"largest": lambda t: brought.append(t.clone()) or t.zero_(), "total": lambda t: brought.append(t) or t + 1}
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    losses = linear_cross_entropy(x, weight, inputs["labels"], columns=0, first=99, backend=backend, **give)
    assert (brought[0] == -torch.inf).all()
    assert not brought[1].any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(losses.sum(), (x, weight)))


class LargestResult(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


@pytest.mark.parametrize("backend, largest", [("plain", 64 * 1000), ("torch", 16 * 1000)])
def test_nobody_holds_the_logits_of_all_tokens(backend, largest):
    x, weight, labels = loss_inputs(T=64, D=8, W=1000).values()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with LargestResult() as seen:
        losses = linear_cross_entropy(x, weight, labels, chunk_tokens=16, backend=backend)
        torch.autograd.grad(losses, (x, weight), torch.ones_like(losses))
    assert seen.numbers == largest


def test_nor_does_it_with_the_kernels():
    triton = pytest.importorskip("nemohybrid_kernels.cross_entropy.triton")
    inputs = loss_inputs(T=64, D=8, W=1000)
    x, weight, labels = (value.to(DEVICE) for value in inputs.values())
    with LargestResult() as seen, launching.recording(90):
        norm = linear.statistics(x, weight, labels, 1000, 16, triton._ROWS)[:2]
        linear.gradients(norm[0], x, weight, labels, norm, 1000, 16, True, True, triton._ROWS)
    assert seen.numbers == 16 * 1000


def test_nothing_but_arguments_and_two_numbers_a_token_are_kept():
    inputs = {k: v.requires_grad_(v.is_floating_point()) for k, v in loss_inputs(dtype=torch.bfloat16).items()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        linear_cross_entropy(**inputs, backend="torch")
    own = [t for pointer, t in kept.items() if pointer not in {v.data_ptr() for v in inputs.values()}]
    assert sorted(t.nbytes for t in own) == [37 * 8, 37 * 8], "labels of this holder; largest logit and sum"


@pytest.mark.parametrize(
    "tokens, rows, asked, size",
    [
        (8192, 131072, None, 4096),
        (9000, 131072, None, 3072),
        (8192, 16384, None, 8192),
        (20000, 16384, None, 6784),
        (50, 131072, None, 128),
        (7, 10**7, None, 128),
        (100, 10, 3, 3),
        (0, 10, None, 1),
    ],
)
def test_chunks_are_as_large_as_memory_allows_and_about_equal(tokens, rows, asked, size):
    assert linear.chunk_size(tokens, rows, 2, asked) == size


@CHUNKED
def test_two_runs_are_equal_bit_by_bit(backend, results_and_gradients):
    inputs = loss_inputs(T=50, W=1000, dtype=torch.bfloat16)
    first, second = (results_and_gradients(run(backend, chunk_tokens=20), inputs) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"


@CHUNKED
def test_only_wanted_gradients_are_made(backend):
    inputs = {name: value.to(DEVICE) for name, value in loss_inputs(T=4, W=9).items()}
    both = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in inputs.items()}
    want = torch.autograd.grad(linear_cross_entropy(**both, backend=backend).sum(), (both["x"], both["weight"]))
    for name, expected in zip(("x", "weight"), want, strict=True):
        leaf = inputs[name].clone().requires_grad_()
        losses = linear_cross_entropy(**(inputs | {name: leaf}), backend=backend)
        assert torch.equal(torch.autograd.grad(losses.sum(), leaf)[0], expected), name


def test_the_operators_are_what_they_say_to_torch():
    triton = pytest.importorskip("nemohybrid_kernels.cross_entropy.triton")
    x, weight, labels = (value.to(DEVICE) for value in loss_inputs(T=4, W=9).values())
    torch.library.opcheck(triton._statistics, (x, weight, labels, 9, 3))
    norm = linear.statistics(x, weight, labels, 9, 3, triton._ROWS)[:2].clone()
    torch.library.opcheck(triton._gradients, (norm[0].clone(), x, weight, labels, norm, 9, 3, True, True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
@CHUNKED
def test_a_compiled_graph_has_no_breaks_and_the_same_gradients(backend, assert_same, results_and_gradients):
    inputs, loss = loss_inputs(T=9), run(backend, chunk_tokens=4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(results_and_gradients(compiled, inputs), results_and_gradients(loss, inputs), 0.0)


def test_launches_can_be_recorded_without_data():
    triton = pytest.importorskip("nemohybrid_kernels.cross_entropy.triton")
    x, weight, labels = (value.to("meta") for value in loss_inputs(T=64, dtype=torch.bfloat16).values())
    with launching.recording(80) as launches:
        stats = linear.statistics(x, weight, labels, 290, 40, triton._ROWS)
        dx, dweight = linear.gradients(stats[0], x, weight, labels, stats[:2], 290, 40, True, True, triton._ROWS)
    assert [start.kernel.__name__ for start in launches] == 2 * ["cross_entropy_rows"] + 2 * ["cross_entropy_gradient"]
    assert (stats.shape, dx.shape, dweight.shape) == ((3, 64), x.shape, weight.shape)


def test_a_gpu_takes_kernels_and_a_cpu_keeps_the_logits():
    possible = backends(torch.bfloat16)
    assert [*possible] == BACKENDS
    assert possible["torch"].reluctance(torch.device("cuda")) is None
    inputs = loss_inputs(T=3)
    if DEVICE == "cpu":
        assert torch.equal(linear_cross_entropy(**inputs), linear_cross_entropy(**inputs, backend="plain"))
    with pytest.raises(BackendError, match=r"no backend 'fast'. Legal: 'auto', 'triton', 'torch', 'plain'"):
        linear_cross_entropy(**inputs, backend="fast")
    with pytest.raises(ShapeError, match=r"x has shape \[3, 24\], expected \[T=2, D=24\]"):
        linear_cross_entropy(**(inputs | {"labels": inputs["labels"][:2]}))
