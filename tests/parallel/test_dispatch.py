"""Tokens that travel to experts of other ranks give what one process gives, and so do all gradients."""

import copy
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import fake_deep_ep
import pytest
import torch
import torch.distributed as dist
from forked import run_world
from host_waits import nothing_waits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nemohybrid.errors import ConfigError
from nemohybrid.parallel.context import Group
from nemohybrid.parallel.expert import AllToAll, DeepEP, Dispatcher, Placement, Slots, all_to_all, choose, deepep, slots
from nemohybrid.parallel.expert.deepep import Fastest, _Crossing
from nemohybrid.parallel.expert.routes import Routes
from nemohybrid_kernels.moe import expert_mlp

# T tokens of a rank, E experts, K experts a token visits, D hidden, F expert width

TOLERANCE = 1e-6
"""Of the largest entry of the tensor of one process, fp32."""
BF16_TOLERANCE = 2e-2
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """EP expert ranks, each of ETP tensor ranks."""

    expert: int
    tensor: int = 1

    @property
    def ranks(self) -> int:
        return self.expert * self.tensor

    def placement(self, experts: int) -> Placement:
        return Placement(experts, Group(self.ranks, dist.get_rank(), dist.group.WORLD), self.tensor)

    def __str__(self) -> str:
        return f"ep{self.expert}-etp{self.tensor}"


@dataclass(frozen=True)
class Problem:
    """Tokens of each rank, and experts; `experts_of(ids)` changes the random choice of experts."""

    tokens: tuple[int, ...]
    experts_of: Callable[[Tensor], Tensor] = lambda ids: ids
    E: int = 8
    K: int = 3
    D: int = 16
    F: int = 8
    dtype: torch.dtype = torch.float32

    def inputs(self) -> Results:
        """Of all ranks, in their order."""
        g = torch.Generator().manual_seed(3)
        T = sum(self.tokens)
        normal = partial(torch.randn, generator=g)
        return {
            "x": normal(T, self.D).to(self.dtype),
            "ids": self.experts_of(torch.rand(T, self.E, generator=g).argsort(1)[:, : self.K]),
            "weights": torch.rand(T, self.K, generator=g),
            "up": normal(self.E, self.F, self.D),
            "down": normal(self.E, self.D, self.F),
            "d_out": normal(T, self.D).to(self.dtype),
            "shared": normal(self.D, 37).to(self.dtype),
        }

    def own(self, inputs: Results, placement: Placement) -> Results:
        """This rank's tokens and part of the experts."""
        rank = placement.block.rank
        first, count = sum(self.tokens[:rank]), self.tokens[rank]
        experts = slice(placement.first, placement.first + placement.local)
        width = self.F // placement.tensor
        part = slice(rank % placement.tensor * width, (rank % placement.tensor + 1) * width)
        cut = {name: tensor[first : first + count] for name, tensor in inputs.items()}
        cut["up"], cut["down"] = inputs["up"][experts, part], inputs["down"][experts, :, part]
        return cut | {"shared": inputs["shared"]}


def squared_relu(h: Tensor) -> Tensor:
    return h.relu().square()


def outcome(inputs: Results, run: Callable[..., tuple[Tensor, Tensor | None]]) -> Results:
    """Output and gradients of `run(inputs, compute, meanwhile)`."""
    inputs = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}

    def compute(rows: Tensor, ids: Tensor, weights: Tensor, absent: bool = False) -> Tensor:
        matrices = inputs["up"], inputs["down"]
        return expert_mlp(rows, ids, weights, *matrices, activation=squared_relu, absent=absent)

    out, beside = run(inputs, compute, lambda: inputs["x"] @ inputs["shared"] @ inputs["shared"].T)
    assert beside is not None
    ((out + 0.1 * beside) * inputs["d_out"]).sum().backward()
    found = {f"d_{name}": inputs[name].grad for name in ("x", "weights", "up", "down", "shared")}
    assert all(gradient is not None for gradient in found.values()), "a gradient is missing"
    return {"out": out.detach()} | found


def through(dispatcher: Dispatcher) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def run(inputs, compute, meanwhile):
        compute = partial(compute, absent=dispatcher.absent)
        return dispatcher.run(inputs["x"], inputs["ids"], inputs["weights"], compute, meanwhile)

    return run


def one_process(inputs, compute, meanwhile):
    return compute(inputs["x"], inputs["ids"], inputs["weights"]), meanwhile()


def differences(problem: Problem, dispatcher: Dispatcher, placement: Placement) -> list[str]:
    """What differs from one process with all tokens and experts."""
    inputs = problem.inputs()
    whole = outcome(inputs, one_process)
    want = problem.own(whole | {n.removeprefix("d_"): t for n, t in whole.items() if n.startswith("d_")}, placement)
    got = outcome(problem.own(inputs, placement), through(dispatcher))
    tolerance = TOLERANCE if problem.dtype == torch.float32 else BF16_TOLERANCE
    found = []
    for name in ("out", "d_x", "d_weights", "d_up", "d_down"):
        expected = want[name.removeprefix("d_")] if name in ("d_up", "d_down") else want[name]
        scale = whole[name].abs().max().item()
        error = (got[name] - expected).abs().max().item() if expected.numel() else 0.0
        if got[name].shape != expected.shape or not error <= tolerance * scale:
            found.append(f"{name} is off by {error / scale:.1e}")
    return found


class WithFake(DeepEP):
    """DeepEP, which is not here, for any tokens."""

    def obstacle(self, x: Tensor) -> None:
        return None


KINDS: dict[str, Callable[[Placement], Dispatcher]] = {
    "exact": AllToAll,
    "slots": partial(Slots, room=16.0),
    "deepep": WithFake,
}
LAYOUTS = [Layout(2), Layout(4), Layout(1, 2), Layout(2, 2)]
CASES = [(kind, layout) for kind in KINDS for layout in LAYOUTS if kind != "deepep" or layout.tensor == 1]
every_case = pytest.mark.parametrize("kind, layout", CASES, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)


def to_one_expert(ids: Tensor) -> Tensor:
    return torch.zeros_like(ids[:, :1])


def not_to_the_last(ids: Tensor) -> Tensor:
    """Experts 6 and 7 are never visited, and a token never visits an expert twice."""
    return torch.arange(len(ids))[:, None].add(torch.arange(ids.shape[1])) % 6


def to_the_next(ids: Tensor) -> Tensor:
    return (ids[:, :1] + torch.arange(ids.shape[1])) % 8


def problems(kind: str, layout: Layout) -> dict[str, Problem]:
    """By what is special about them; those of unequal tokens only where a dispatcher takes them."""
    ranks = layout.ranks
    found = {
        "even": Problem((12,) * ranks),
        "all to one expert": Problem((12,) * ranks, to_one_expert, K=1),
        "experts without visits": Problem((12,) * ranks, not_to_the_last),
        "one token": Problem((1,) * ranks),
        "bf16": Problem((12,) * ranks, dtype=torch.bfloat16),
    }
    if kind != "slots":
        found["uneven"] = Problem(tuple(5 + 3 * rank for rank in range(ranks)))
    if kind == "exact":
        found["a rank without tokens"] = Problem((9, 0, *(5 + rank for rank in range(ranks - 2))))
        found["no tokens but one"] = Problem((0,) * (ranks - 1) + (1,))
    return found


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", fake_deep_ep)


@pytest.fixture
def on_ranks(tmp_path):
    """`on_ranks(size, action)` runs `action()` on every rank, and fails with the first traceback."""

    def run(size: int, action: Callable[[], None]) -> None:
        failures = run_world(size, lambda rank: action(), tmp_path)
        assert not failures, failures[0].read_text()

    return run


@every_case
def test_outputs_and_all_gradients_are_those_of_one_process(kind, layout, on_ranks):
    def check() -> None:
        for name, problem in problems(kind, layout).items():
            placement = layout.placement(problem.E)
            dispatcher = KINDS[kind](placement)
            found = differences(problem, dispatcher, placement)
            assert not found, f"{name}: {found}"
            assert not dispatcher.overflow, f"{name}: {dispatcher.overflow} visits were dropped"

    on_ranks(layout.ranks, check)


@every_case
def test_what_is_computed_again_and_what_is_repeated_is_equal_bit_by_bit(kind, layout, on_ranks):
    def check() -> None:
        problem = Problem((12,) * layout.ranks)
        placement = layout.placement(problem.E)
        run, own = through(KINDS[kind](placement)), problem.own(problem.inputs(), placement)
        again = outcome(own, lambda *args: checkpoint(run, *args, use_reentrant=False))
        for once, twice in ((outcome(own, run), outcome(own, run)), (outcome(own, run), again)):
            assert all(torch.equal(tensor, twice[name]) for name, tensor in once.items())
        with torch.no_grad():
            matrices = own["up"], own["down"]
            compute = partial(_experts, matrices=matrices, absent=kind == "slots")
            out, _ = KINDS[kind](placement).run(own["x"], own["ids"], own["weights"], compute, lambda: None)
        assert torch.equal(out, once["out"])

    on_ranks(layout.ranks, check)


def _experts(rows, ids, weights, matrices, absent):
    return expert_mlp(rows, ids, weights, *matrices, activation=squared_relu, absent=absent)


LETTERS = {"all_to_all_single": "s", "wait_tensor": "w", "_grouped_mm": "e", "mm": "m"}


class Watch(TorchDispatchMode):
    """The order in which is sent, waited, and computed: s, w, e (experts), m (meanwhile). DeepEP's calls likewise."""

    def __init__(self) -> None:
        super().__init__()
        fake_deep_ep.calls.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if letter := LETTERS.get(func.overloadpacket.__name__):
            fake_deep_ep.calls.append(letter)
        return func(*args, **(kwargs or {}))

    @property
    def order(self) -> str:
        """Without repetitions."""
        letters = [
            call if len(call) == 1 else "w" if call.endswith("waited for") else "s" for call in fake_deep_ep.calls
        ]
        return re.sub(r"(.)\1+", r"\1", "".join(letters))


ORDER = {
    "exact": ("swsmwesw", "swesmw"),
    "slots": ("smwesw", "swesmw"),
    "deepep": ("smwesw", "swesmw"),
}
"""Forward, where the exact exchange first learns the loads; backward."""
AGAIN = {"exact": "swswswesw", "slots": "swswesw", "deepep": "swswesw"}
"""Backward of a checkpoint: gradients come, tokens are sent once more, and what the experts gave is not."""


@every_kind
def test_the_shared_expert_runs_while_tokens_travel_both_ways(kind, on_ranks):
    def check() -> None:
        problem, layout = Problem((12, 12)), Layout(2)
        placement = layout.placement(problem.E)
        inputs = problem.own(problem.inputs(), placement)
        inputs = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
        dispatcher, shared = KINDS[kind](placement), inputs["shared"]
        compute = partial(_experts, matrices=(inputs["up"], inputs["down"]), absent=dispatcher.absent)
        given = inputs["x"], inputs["ids"], inputs["weights"]
        with Watch() as forward:
            out, beside = dispatcher.run(*given, compute, lambda: inputs["x"] @ shared @ shared.T)
            order = forward.order
        loss = (out + beside).sum()
        with Watch() as backward:
            loss.backward()
        assert (order, backward.order) == ORDER[kind]

        loss = checkpoint(dispatcher.run, *given, compute, lambda: None, use_reentrant=False)[0].sum()
        with Watch() as backward:
            loss.backward()
        assert backward.order == AGAIN[kind]

    on_ranks(2, check)


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, 2)], ids=str)
def test_with_slots_the_host_never_waits_for_the_device(layout, on_ranks):
    """fp32 in widths of 16 bytes, for which the products too leave the loads where they are."""

    def check() -> None:
        problem = Problem((12,) * layout.ranks)
        placement = layout.placement(problem.E)
        inputs = problem.own(problem.inputs(), placement)
        with nothing_waits():
            outcome(inputs, through(KINDS["slots"](placement)))
        with pytest.raises(AssertionError, match="waits for the device"), nothing_waits():
            outcome(inputs, through(KINDS["exact"](placement)))

    on_ranks(layout.ranks, check)


def dropped(ids: Tensor, placement: Placement, room: int) -> Tensor:
    """[T, K] True for the visits beyond the first `room` to an expert rank, in order of expert and token; in words."""
    visits = sorted((e, t, k) for t, row in enumerate(ids.tolist()) for k, e in enumerate(row))
    found, used = torch.zeros_like(ids, dtype=torch.bool), [0] * placement.ranks
    for expert, t, k in visits:
        used[expert // placement.local] += 1
        found[t, k] = used[expert // placement.local] > room
    return found


@pytest.mark.parametrize("layout", [Layout(4), Layout(2, 2)], ids=str)
def test_visits_without_a_slot_are_dropped_and_counted_until_there_is_room(layout, on_ranks):
    """What is dropped acts as if its weight were zero, and its weight gets no gradient."""

    def check() -> None:
        problem = Problem((24,) * layout.ranks, to_the_next)
        problem = replace(problem, experts_of=lambda ids: to_the_next(ids // 2))  # few experts are chosen first
        placement = layout.placement(problem.E)
        dispatcher = Slots(placement, room=0.4)
        everyone, rows = problem.inputs(), dispatcher.slots(24, problem.K)
        parts = [dropped(ids, placement, rows) for ids in everyone["ids"].split(24)]
        lost, mine = torch.cat(parts), parts[placement.block.rank]
        assert mine.any()
        own = problem.own(everyone, placement)
        got = outcome(own, through(dispatcher))
        assert dispatcher.overflow.item() == mine.sum()
        whole = outcome(everyone | {"weights": everyone["weights"].masked_fill(lost, 0)}, one_process)
        first = 24 * placement.block.rank
        for name in ("out", "d_x"):
            torch.testing.assert_close(got[name], whole[name][first : first + 24], rtol=1e-5, atol=1e-4)
        assert not got["d_weights"][mine].any()
        rooms = [dispatcher.room]
        while dispatcher.overflow:
            dispatcher.reset()
            assert dispatcher.overflow == 0
            dispatcher.grow()
            outcome(own, through(dispatcher))
            dist.all_reduce(dispatcher.overflow)
            rooms.append(dispatcher.room)
        assert rooms in ([0.4, 0.8, 1.6], [0.4, 0.8, 1.6, 3.2]), rooms
        assert not differences(problem, dispatcher, placement)

    on_ranks(layout.ranks, check)


def test_slots_are_no_more_than_can_be_needed():
    placement = Placement(8, Group(4))
    assert Slots(placement, 1.0).slots(64, 2) == 32
    assert Slots(placement, 1.1).slots(64, 2) == 40, "in steps of 8"
    assert Slots(placement, 100.0).slots(64, 3) == 64 * 2, "two experts a rank"
    assert Slots(placement, 1.0).slots(1, 2) == 2
    assert Slots(placement, 1.0).slots(0, 2) == 0


FAULTS = {}


def fault(kind: str, layout: Layout):
    """A function that plants a fault in the process that calls it, and where it must be seen."""

    def register(plant):
        FAULTS[plant.__name__] = plant, kind, layout
        return plant

    return register


@fault("exact", Layout(2))
def the_weights_get_no_gradient():
    real = Routes._collected

    def collected(self, d_rows, d_weights):
        return real(self, d_rows, torch.zeros_like(d_weights))

    Routes._collected = collected


@fault("exact", Layout(1, 2))
def the_summands_of_tensor_ranks_are_not_summed():
    Routes._by_token = lambda self, rows: self._gathered(rows)[:, :, 0].sum(1)


@fault("exact", Layout(2))
def the_neighbouring_expert_computes():
    real = all_to_all._ids
    all_to_all._ids = lambda theirs, rows: (real(theirs, rows) + 1) % theirs.shape[1]


@fault("exact", Layout(2))
def gradients_go_back_with_the_splits_of_the_way_there():
    Routes._home = Routes._out


@fault("exact", Layout(2, 2))
def both_copies_of_a_visit_go_to_one_tensor_rank():
    real = all_to_all._tables

    def tables(*args):
        visit, rows = real(*args)
        return visit, rows[..., :1].expand_as(rows)

    all_to_all._tables = tables


@fault("slots", Layout(2))
def visits_take_the_slots_of_the_neighbour():
    real = slots._routes

    def routes(*args):
        found = real(*args)
        return replace(found, rows=(found.rows + args[-1]) % len(found.visit))

    slots._routes = routes


@fault("slots", Layout(2))
def somebody_computes_what_is_in_empty_slots():
    real = slots._ids
    slots._ids = lambda theirs, count: real(theirs, count).clamp(max=theirs.shape[1] - 1)


@fault("deepep", Layout(2))
def deepep_combines_no_gradient_of_the_weights():
    deepep._Arrived.per_choice = lambda self, of_visits: torch.zeros(self.place.shape)


@fault("deepep", Layout(2))
def results_of_deepep_are_not_waited_for():
    deepep._after = lambda event, *tensors: lambda: tensors


@fault("deepep", Layout(2))
def the_gradients_of_deepep_are_not_added_to_tokens():
    real = _Crossing._combine_gradients
    _Crossing._combine_gradients = lambda self, d_rows, d_weights: real(self, d_rows * 0, d_weights)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name, on_ranks):
    plant, kind, layout = FAULTS[name]

    def check() -> None:
        problem = problems(kind, layout)["uneven" if kind != "slots" else "even"]
        placement = layout.placement(problem.E)
        plant()
        try:
            found = differences(problem, KINDS[kind](placement), placement)
        except RuntimeError as error:
            found = ["Split sizes" in str(error)]
        assert any(found), f"{name} is not seen"

    on_ranks(layout.ranks, check)


@every_case
def test_an_imaginary_block_has_the_shapes_of_an_even_load(kind, layout):
    """Memory is planned with it: nothing is there but the first rank."""
    T, K, E, D = 10, 3, 8, 16
    dispatcher = KINDS[kind](Placement(E, Group(layout.ranks), layout.tensor))
    meta = partial(torch.empty, device="meta")
    x, weights = meta(T, D, requires_grad=True), meta(T, K, requires_grad=True)
    seen = []

    def compute(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        seen.append((rows.shape[0], tuple(ids.shape), tuple(weights.shape)))
        return rows * weights

    out, beside = dispatcher.run(x, meta(T, K, dtype=torch.int64), weights, compute, lambda: None)
    out.sum().backward()
    rows = T * K * layout.tensor if kind != "slots" else layout.ranks * dispatcher.slots(T, K)
    assert seen == [(rows, (rows, 1), (rows, 1))]
    assert (out.shape, beside, x.grad.shape, weights.grad.shape) == ((T, D), None, (T, D), (T, K))


@every_kind
def test_a_block_of_one_computes_what_it_is_given(kind):
    given = torch.randn(4, 8), torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
    seen = []
    out, beside = KINDS[kind](Placement(8)).run(*given, lambda *args: seen.extend(args) or args[0], lambda: given[2])
    assert all(one is other for one, other in zip((*seen, out, beside), (*given, given[0], given[2]), strict=True))


def test_who_is_where():
    placement = Placement(12, Group(6, rank=3), tensor=2)
    assert (placement.ranks, placement.local, placement.first) == (3, 4, 4)


@pytest.mark.parametrize(
    "kind, room, tensor, told",
    [
        ("all2all", None, 1, "no dispatcher 'all2all'"),
        ("deepep", None, 2, "deepep cannot share an expert by 2 tensor ranks. Legal: 1, or all_to_all"),
        ("deepep", 1.5, 1, "room is for all_to_all"),
        ("deepep", None, 1, "No module named 'deep_ep'. Install it from github.com/deepseek-ai/DeepEP"),
    ],
)
def test_what_cannot_run_is_refused_in_words(kind, room, tensor, told, monkeypatch):
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    with pytest.raises(ConfigError, match=re.escape(told)):
        choose(Placement(8, Group(4), tensor), kind, room)


def test_the_kind_that_runs_is_the_one_asked_for(monkeypatch):
    placement = Placement(8, Group(4))
    assert isinstance(choose(placement, "auto", None), AllToAll)
    assert isinstance(choose(placement, "all_to_all", 0.0), AllToAll)
    assert isinstance(choose(placement, "auto", 1.25), Slots)
    assert isinstance(choose(placement, "deepep", None), DeepEP)
    on_gpus = replace(placement, block=Group(4, 0, "group"))
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    assert isinstance(copy.deepcopy(choose(on_gpus, "auto", None)), Fastest), "models are copied"
    monkeypatch.delattr(fake_deep_ep, "Buffer")
    assert isinstance(choose(on_gpus, "auto", None), AllToAll)


@pytest.mark.parametrize(
    "ranks, width, dtype, device, told",
    [
        (8, 48, torch.bfloat16, "cuda", None),
        (8, 24, torch.bfloat16, "cuda", "multiples of 16 channels, not 24"),
        (16, 384, torch.bfloat16, "cuda", "multiples of 256 channels, not 384"),
        (8, 48, torch.float32, "cuda", "sends bfloat16, these tokens are float32"),
        (8, 48, torch.bfloat16, "cpu", "needs tokens on a GPU, these are on cpu"),
    ],
)
def test_what_deepep_cannot_send_is_named(ranks, width, dtype, device, told):
    class Tokens:
        shape = (5, width)

    Tokens.dtype, Tokens.device = dtype, torch.device(device)
    found = DeepEP(Placement(16, Group(ranks))).obstacle(Tokens())
    assert found is None if told is None else told in (found or "")


def test_a_number_of_ranks_without_settings_is_refused():
    class Ranks:
        def size(self) -> int:
            return 6

    with pytest.raises(ConfigError, match="Unsupported number of EP ranks: 6"):
        deepep._buffer(fake_deep_ep, Ranks(), 64)
