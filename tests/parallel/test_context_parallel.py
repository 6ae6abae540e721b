"""What travels between ranks that share the tokens of a row, each part against one process that has the whole row."""

import json
from functools import partial

import pytest
import torch
from forked import run_world
from layouts import Layout, run_config
from torch import distributed as dist

from nemohybrid.errors import ConfigError, DataError
from nemohybrid.generate.engine import generate_tokens
from nemohybrid.generate.sampling import Sampling
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.layer import Layer
from nemohybrid.model.mlp import MLP
from nemohybrid.model.sequence import SequenceContext, segment_numbers
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.parallel.context_parallel import ring
from nemohybrid.parallel.context_parallel.attention import attend_by_heads
from nemohybrid.parallel.context_parallel.borders import borders, whole_rows
from nemohybrid.parallel.context_parallel.heads import by_rank, to_heads, to_tokens
from nemohybrid.parallel.context_parallel.moves import from_left, shifted
from nemohybrid.parallel.context_parallel.ring import balanced, in_order, ring_attention
from nemohybrid.parallel.context_parallel.states import carried
from nemohybrid.train.batch import Batch
from nemohybrid.train.parity import observe
from nemohybrid_kernels.attention import Documents
from nemohybrid_kernels.attention.parts import keys as attention_keys
from nemohybrid_kernels.attention.reference import attention_torch
from nemohybrid_kernels.ssd.final_state import ssd_final_state
from nemohybrid_kernels.ssd.reference import ssd_sequential

RANKS = pytest.mark.parametrize("ranks", [2, 3, 4])
LENGTH = 24  # which 2 ranks of 2 to 4 divide
DOCUMENTS = pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])


def on_ranks(ranks, tmp_path, action):
    """action(group) on so many Gloo ranks -> nothing, or the tracebacks of those that failed."""
    failures = run_world(ranks, lambda rank: action(Group(ranks, rank, dist.group.WORLD)), tmp_path)
    assert not failures, failures[0].read_text()


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def document_ids(rows=3, length=LENGTH):
    """Rows of many short documents, of one that comes back, and of one alone."""
    ids = torch.randint(0, 2, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[1] = (torch.arange(length) // 7) % 2
    ids[2] = 5
    return ids


def own(x, group, dim=1):
    return x.chunk(group.size, dim)[group.rank]


def same(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@RANKS
def test_borders_know_the_documents_of_whole_rows(ranks, tmp_path):
    def check(group):
        ids = document_ids()
        found, segments = borders(own(ids, group), group), segment_numbers(ids) - 1
        same(found.segments.long(), own(segments, group))
        positions = SequenceContext(*ids.shape, document_ids=ids).positions(ids.device)
        seq = SequenceContext(3, LENGTH // ranks, document_ids=own(ids, group), context=group)
        same(seq.positions(ids.device), own(positions, group))
        first = group.rank * LENGTH // ranks
        goes_on = segments[:, first - 1] == segments[:, first] if group.rank else torch.zeros(3, dtype=torch.bool)
        same(found.goes_on, goes_on)
        same(whole_rows(found.segments, group).long(), segments)

    on_ranks(ranks, tmp_path, check)


@RANKS
def test_rows_without_documents_go_on_from_rank_to_rank(ranks, tmp_path):
    def check(group):
        seq = SequenceContext(2, 6, context=group)
        assert seq.goes_on_from_left() == float(group.rank > 0)
        assert seq.positions(torch.device("cpu"))[0].tolist() == list(range(6 * group.rank, 6 * group.rank + 6))

    on_ranks(ranks, tmp_path, check)


@RANKS
def test_what_stands_further_right_may_be_on_the_next_rank(ranks, tmp_path):
    def check(group):
        values = torch.arange(3 * LENGTH).view(3, LENGTH) + 1
        for by in (0, 1, 3):
            want = torch.cat([values[:, by:], torch.zeros_like(values[:, :by])], 1)
            same(shifted(own(values, group), by, group), own(want, group))
            same(shifted(own(values % 2 == 0, group), by, group), own((want % 2 == 0) & (want > 0), group))

    on_ranks(ranks, tmp_path, check)


@RANKS
def test_what_comes_from_the_left_sends_its_gradient_back(ranks, tmp_path):
    def check(group):
        x = torch.full((2,), group.rank + 1.0, requires_grad=True)
        came = from_left(x, group)
        assert came.tolist() == [float(group.rank)] * 2
        (came * 10 * (group.rank + 1)).sum().backward()
        right = group.rank + 1 < group.size
        assert x.grad is not None
        assert x.grad.tolist() == [10.0 * (group.rank + 2) * right] * 2

    on_ranks(ranks, tmp_path, check)


@pytest.mark.parametrize("ranks, heads", [(2, 4), (3, 6), (4, 4), (4, 2)])
def test_heads_travel_and_come_back(ranks, heads, tmp_path):
    """Fewer heads than ranks are repeated, and their gradients add up."""

    def check(group):
        x = numbers(2, LENGTH, heads * 3)
        part = own(x, group).clone().requires_grad_()
        (mine,) = to_heads([(part, heads)], group)
        same(mine, by_rank(x, heads, group)[:, :, group.rank])
        weights = numbers(2, LENGTH, max(heads, ranks) * 3, seed=1)
        (mine * by_rank(weights, max(heads, ranks), group)[:, :, group.rank]).sum().backward()
        each = weights.unflatten(-1, (heads, -1, 3)).sum(3).flatten(2)
        same(part.grad, own(each, group))
        if heads >= ranks:
            same(to_tokens(mine.detach(), group), own(x, group))

    on_ranks(ranks, tmp_path, check)


@RANKS
def test_halves_are_balanced_and_come_back(ranks, tmp_path):
    def check(group):
        x = torch.arange(LENGTH)
        mine = balanced(own(x, group, 0), 0, group)
        halves = x.chunk(2 * ranks)
        same(mine, torch.cat([halves[group.rank], halves[2 * ranks - 1 - group.rank]]))
        same(in_order(mine, 0, group), own(x, group, 0))

    on_ranks(ranks, tmp_path, check)


def attended(q, k, v, ids, softcap, share):
    """The result and the gradients of q, k and v under `share`, which attends."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = share(*leaves, ids, softcap)
    out.backward(out.detach().sin())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def at_once(q, k, v, ids, softcap):
    return attention_torch(q, k, v, documents=None if ids is None else Documents(ids), softcap=softcap)


@RANKS
@DOCUMENTS
@pytest.mark.parametrize("way", ["ring", "heads"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["uncapped", "capped"])
def test_attention_is_that_of_the_whole_row(ranks, packed, way, softcap, tmp_path, monkeypatch):
    """Grouped keys; scores are made for a few queries at a time."""
    monkeypatch.setattr(attention_keys, "SCORES_AT_ONCE", 3 * 12 * 12)
    ids = document_ids() if packed else None
    q, k, v = numbers(3, 12, LENGTH, 5), numbers(3, 3 if ranks == 3 else 4, LENGTH, 5, seed=1), None
    v = numbers(*k.shape, seed=2)
    want = attended(q, k, v, ids, softcap, at_once)

    def shared(group, q, k, v, ids, softcap):
        if way == "ring":
            segments = None if ids is None else own(segment_numbers(ids).int(), group)
            return ring_attention(q, k, v, segments, group, softcap)
        return attend_by_heads(q, k, v, partial(at_once, ids=ids, softcap=softcap), group)

    def check(group):
        got = attended(*(own(x, group, 2) for x in (q, k, v)), ids, softcap, partial(shared, group))
        for mine, whole in zip(got, want, strict=True):
            same(mine, own(whole, group, 2))

    on_ranks(ranks, tmp_path, check)


def test_what_a_ring_sends_travels_while_it_computes(tmp_path, monkeypatch):
    """Keys and values, and going back their gradients: nothing is waited for that the next part does not need."""
    ranks = 3
    said, real = [], {name: getattr(ring, name) for name in ("_send", "part_of_attention", "gradients_of_part")}

    def send(x, group):
        what = "gradients" if x.dtype == torch.float32 else "keys"
        said.append(f"send {what}")
        came = real["_send"](x, group)
        return lambda: said.append(f"take {what}") or came()

    def computed(name):
        return lambda *given, **more: said.append("compute") or real[name](*given, **more)

    monkeypatch.setattr(ring, "_send", send)
    for name in ("part_of_attention", "gradients_of_part"):
        monkeypatch.setattr(ring, name, computed(name))

    def check(group):
        q, k, v = (numbers(1, heads, 8, 4).bfloat16().requires_grad_() for heads in (2, 1, 1))
        out = ring_attention(q, k, v, None, group)
        assert said == [*["send keys", "compute", "take keys"] * (ranks - 1), "compute"]
        said.clear()
        out.sum().backward()
        first, last = ["send keys", "compute", "send gradients"], ["compute", "take gradients", "send gradients"]
        between = ["send keys", "compute", "take gradients", "send gradients", "take keys"]
        assert said == [*first, "take keys", *between * (ranks - 2), *last, "take gradients"]

    on_ranks(ranks, tmp_path, check)


def scan_inputs():
    return {
        "x": numbers(3, LENGTH, 4, 5),
        "dt": numbers(3, LENGTH, 4, seed=1).exp() / 4,
        "A": -numbers(4, seed=2).exp(),
        "B": numbers(3, LENGTH, 2, 6, seed=3),
    }


@DOCUMENTS
def test_the_state_a_scan_leaves_and_its_gradients(packed, monkeypatch):
    """Against the scan itself, by which the second result is what one multiplies a state with that was there before."""
    monkeypatch.setattr("nemohybrid_kernels.ssd.final_state.TOKENS_AT_ONCE", 7)
    inputs, before = scan_inputs(), numbers(3, 4, 5, 6, seed=5)
    ids = document_ids() if packed else None
    found = []
    for run in (ssd_final_state, ssd_sequential):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        if run is ssd_final_state:
            state, decay = run(**leaves, document_ids=ids)
            state = state + decay[..., None, None] * before
        else:
            _, state = run(**leaves, C=torch.zeros_like(inputs["B"]), document_ids=ids, initial_state=before)
        state.backward(state.detach().cos())
        found.append([state.detach(), *(leaf.grad for leaf in leaves.values())])
    for got, want in zip(*found, strict=True):
        same(got, want, 1e-9)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_state_is_carried_from_rank_to_rank(ranks, tmp_path):
    """Whatever the number of ranks; both ways against a loop."""
    left, decay = numbers(ranks, 2, 3, 4, 5), numbers(ranks, 2, 3, seed=1).sigmoid()
    leaves = [x.clone().requires_grad_() for x in (left, decay)]
    states = [torch.zeros_like(left[0])]
    for rank in range(ranks - 1):
        states.append(leaves[1][rank][..., None, None] * states[-1] + leaves[0][rank])
    want = torch.stack(states)
    want.backward(want.detach().cos())

    def check(group):
        mine = [x[group.rank].clone().requires_grad_() for x in (left, decay)]
        state = carried(*mine, group)
        same(state, want[group.rank].detach())
        state.backward(state.detach().cos())
        for leaf, whole in zip(mine, leaves, strict=True):
            assert leaf.grad is not None
            same(leaf.grad, whole.grad[group.rank])

    on_ranks(ranks, tmp_path, check)


@RANKS
@pytest.mark.parametrize("eod", [None, 0])
def test_targets_of_drafts_are_those_of_the_whole_row(ranks, eod, tmp_path):
    """A row of 22 tokens, which does not divide: what fills it up never counts."""
    tokens = torch.randint(0, 4, (3, 23), generator=torch.Generator().manual_seed(7))
    ends = tokens[:, :-1] == 0
    ids = (ends.cumsum(1) - ends.long()).int()
    whole = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(3, 22), ids, eod)

    def check(group):
        mine = whole.shared_by(group)
        full = mine.tokens.shape[1] * ranks
        assert full in range(22, 22 + 2 * ranks)
        for (labels, mask), (all_labels, all_masks) in zip(mine.draft_targets(2), whole.draft_targets(2), strict=True):
            pad = torch.nn.functional.pad(all_masks, (0, full - 22))
            same(mask, own(pad, group))
            same(labels * mask.long(), own(torch.nn.functional.pad(all_labels, (0, full - 22)) * pad.long(), group))

    on_ranks(ranks, tmp_path, check)


def test_context_ranks_generate_what_one_rank_generates(tmp_path):
    """Whole rows on each; and what describes other rows than the model has is refused."""
    config = run_config().model
    prompt = torch.arange(1, 12)[None]
    want = generate_tokens(HybridModel.create(config, seed=1), prompt.tolist(), 8, Sampling(temperature=0.0))

    def check(group):
        context = ParallelContext(torch.device("cpu"), group.rank, 2, data=group, context=group)
        model = HybridModel.create(config, seed=1, context=context)
        assert generate_tokens(model, prompt.tolist(), 8, Sampling(temperature=0.0)) == want
        with pytest.raises(DataError, match="2 ranks share the rows of this model"):
            model.hidden_states(prompt, SequenceContext(1, 11))
        with pytest.raises(DataError, match="drafts are cut off"):
            model.forward_mtp(prompt)

    on_ranks(2, tmp_path, check)


def test_a_layer_that_does_not_know_shared_rows_is_refused(monkeypatch):
    monkeypatch.setattr(MLP, "shares_rows", False)
    with pytest.raises(ConfigError, match=r"MLP of '-' does not know rows that ranks share"):
        Layer("-", run_config().model, ParallelContext(torch.device("cpu"), context=Group(2)))


def test_memory_of_a_rank_is_that_of_its_tokens(tmp_path):
    """Rows of 1, 2 and 4 times the length on as many ranks: what a layer of each kind keeps, and at its height holds."""
    seen = {ranks: most_bytes(ranks, tmp_path / str(ranks), peaks) for ranks in SIZES}
    for way in seen[2]:
        assert seen[8][way] <= 1.02 * seen[2][way], (way, seen)
        assert seen[4][way] <= 1.02 * seen[2][way], (way, seen)


@pytest.mark.parametrize("method, packed", [("ring+all_to_all", True), ("all_to_all+states", False)])
def test_memory_of_a_model_is_that_of_its_tokens(method, packed, tmp_path):
    """In a whole step, with experts and drafts, and as many groups as ranks, beyond which they are repeated.

    Documents are a mask of all pairs in PyTorch's attention on CPUs, so that attention by heads has none.
    """

    def step(group):
        layout = Layout(context=group.size, method=method)
        config = layout.configured(run_config("latent", rows=1))
        config.model.mamba_num_groups = config.model.num_query_groups = max(SIZES)
        config.data.sequence_length = 32 * group.size
        context = layout.of_this_rank(config)
        return {"model": LiveBytes().of(partial(observe, config, context, 1, packed))}

    seen = [most_bytes(ranks, tmp_path / str(ranks), step)["model"] for ranks in SIZES]
    assert max(seen) <= 1.01 * seen[0], seen


SIZES = (2, 4, 8)
"""Ranks, each of which has as many tokens."""


def most_bytes(ranks, folder, measure):
    """measure(group) -> names and bytes, on so many ranks; of each the most."""
    folder.mkdir()
    on_ranks(ranks, folder, lambda group: (folder / f"bytes{group.rank}").write_text(json.dumps(measure(group))))
    every = [json.loads(file.read_text()) for file in folder.glob("bytes*")]
    return {name: max(one[name] for one in every) for name in every[0]}


def peaks(group):
    """Bytes of all tensors that live at the height of a forward and backward pass of attention and of a scan."""
    return {way: LiveBytes().of(partial(run, group)) for way, run in WAYS.items()}


def ring_pass(group):
    q, k, v = (torch.randn(1, heads, 256, 16, requires_grad=True) for heads in (4, 2, 2))
    ring_attention(q, k, v, torch.zeros(1, 256, dtype=torch.int32), group).sum().backward()


def heads_pass(group):
    q, k, v = (torch.randn(1, 8, 256, 16, requires_grad=True) for _ in range(3))
    attend_by_heads(q, k, v, lambda q, k, v: q * k + v, group).sum().backward()


def states_pass(group):
    x, B = (torch.randn(1, 256, heads, 8, requires_grad=True) for heads in (4, 2))
    dt = torch.rand(1, 256, 4, requires_grad=True)
    carried(*ssd_final_state(x, dt, -torch.ones(4), B), group).sum().backward()


WAYS = {"ring": ring_pass, "heads": heads_pass, "states": states_pass}


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what operators return until nobody holds it any more."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.sizes = 0, 0, {}

    def of(self, run):
        with self:
            run()
        return self.peak

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        import weakref

        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.live -= self.sizes.pop(key, 0)
