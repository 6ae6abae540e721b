"""Faults of the kind that train silently wrong are planted one by one; the proof must see each.

A fault that survives makes this file red: then `test_parity.py` proves less than it says.
"""

from dataclasses import replace

import pytest
import torch
from layouts import Layout, compare

import nemohybrid.parallel.data as data
import nemohybrid.parallel.gradients as gradients
import nemohybrid.parallel.layout as layouts
import nemohybrid.parallel.pipeline as pipeline
import nemohybrid.train.balance as balance
import nemohybrid.train.build as build
import nemohybrid.train.parity as parity
import nemohybrid.train.step as step
from nemohybrid.model import embedding, sequence
from nemohybrid.model import mamba2_shared_rows as shared_rows
from nemohybrid.model.linear import Linear
from nemohybrid.model.mamba2 import CausalConv
from nemohybrid.model.mamba2_shared_rows import HeadsPart
from nemohybrid.model.moe.balance import RouterLosses, Rows
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.collectives import gathered, own_part, summed, summed_part
from nemohybrid.parallel.context import Group
from nemohybrid.parallel.context_parallel import ring, states
from nemohybrid.parallel.expert import routes
from nemohybrid.parallel.layout import attach, layout_of
from nemohybrid.parallel.tensor import TensorRanks, _exchange
from nemohybrid.train import batch
from nemohybrid.train.batch import Batch

SHARED_BY = Batch.shared_by

TP2, TP2_SP, TP4 = Layout(tensor=2), Layout(tensor=2, sequence=True), Layout(tensor=4)
DP2, FULL2 = Layout(data=2), Layout(data=2, shard=2)
PP2, VPP2 = Layout(pipeline=2), Layout(pipeline=2, virtual=2)
RING2, HEADS2 = Layout(context=2, method="ring+states"), Layout(context=2, method="all_to_all")
RING4 = Layout(context=4, method="ring+states")
PP2_FULL2 = Layout(pipeline=2, data=2, shard=2)
EP2, ETP2 = Layout(data=2, expert=2), Layout(data=2, expert_tensor=2)

FAULTS = {}


def fault(layout: Layout, model: str = "every_option"):
    """A function that plants a fault in the process that calls it, and the layout under which it must be seen."""

    def register(plant):
        FAULTS[plant.__name__] = (plant, layout, model)
        return plant

    return register


@fault(TP2)
def gradients_of_a_shared_region_are_not_summed():
    TensorRanks.enter = lambda self, x: x


@fault(TP2)
def gradients_are_doubled_on_the_way_into_a_region():
    TensorRanks.leave = lambda self, x: _exchange(x, self.group, summed, summed)


@fault(TP2_SP)
def gathered_tokens_get_their_own_gradient_alone():
    TensorRanks.enter = lambda self, x: _exchange(x, self.group, gathered, own_part)


@fault(TP2_SP)
def tokens_leave_to_the_neighbour():
    def other_part(x, group):
        return summed_part(x.roll(x.shape[0] // 2, 0), group)

    TensorRanks.leave = lambda self, x: _exchange(x, self.group, other_part, gathered)


@fault(TP2_SP)
def the_gradient_of_a_norm_on_the_stream_is_not_summed():
    gradients.is_partial = lambda layout, context: layout.shard is None and layout.partial == "always"


@fault(TP2)
def the_gradient_of_a_norm_of_heads_is_not_summed():
    gradients.is_partial = lambda layout, context: False


@fault(TP2)
def gradients_that_are_whole_are_summed():
    gradients.is_partial = lambda layout, context: layout.shard is None


@fault(TP4)
def copies_of_key_value_heads_drift_apart():
    gradients.Box.copies = property(lambda box: 1, lambda box, value: None)


@fault(Layout(tensor=2, data=2, sequence=True))
def partial_gradients_are_summed_over_the_wrong_group():
    real = gradients.sum_partial_gradients
    data.sum_partial_gradients = lambda parameters, context: real(parameters, replace(context, tensor=context.data))


@fault(TP2)
def every_copy_counts_in_the_norm():
    gradients._owned = lambda parameter, context: [parameter.grad]


@fault(FULL2)
def the_norm_of_a_part_is_taken_for_the_whole():
    real = gradients.gradient_norm
    parity.gradient_norm = lambda parameters, context: real(parameters, None)


@fault(TP2)
def a_shard_is_that_of_the_neighbour():
    from nemohybrid.model import init

    real = init.draw

    def shifted(box, target, seed, name):
        rows = box.piece.shape[0]
        other = (box.offsets[0] + rows // 2) % rows if box.shape[0] * 2 == rows else box.offsets[0]
        real(replace(box, offsets=(other, *box.offsets[1:])), target, seed, name)

    init.draw = shifted


@fault(TP2)
def a_shard_is_loaded_into_the_wrong_piece():
    from nemohybrid.model import init

    real = init.logical_name
    init.logical_name = lambda name, piece: real(name, piece).replace("in_proj.B", "in_proj.C")


@fault(TP2, "latent")
def gate_and_up_are_cut_as_one():
    layouts.Shard.blocks = property(lambda shard: 1, lambda shard, value: None)


@fault(TP2)
def a_row_bias_is_added_by_every_rank():
    Linear.carries_bias = property(lambda self: True, lambda self, value: None)


@fault(TP2)
def the_loss_knows_its_own_largest_logit_alone():
    embedding.largest_over = lambda tensor, group: tensor


@fault(TP2)
def labels_of_the_other_rank_count_as_column_zero():
    import nemohybrid_kernels.cross_entropy.columns as columns

    columns._own_column = lambda labels, first, n: ((labels - first).clamp(0, n - 1), torch.ones_like(labels).bool())


@fault(TP2_SP)
def the_balance_of_a_row_is_judged_by_its_own_tokens():
    real = RouterLosses.arrived

    def alone(self, probabilities, z, counted):
        loads, choices, shares, _ = counted
        return real(self, probabilities, z, (loads, choices, shares, TensorRanks()))

    RouterLosses.arrived = alone


@fault(TP2_SP, "latent")
def tokens_count_for_the_wrong_row():
    Rows.length = property(lambda rows: rows.tokens // rows.count // 2)


@fault(TP2_SP)
def the_router_bias_follows_the_load_of_its_own_rank():
    balance.sum_over = lambda tensor, group: tensor


@fault(TP2)
def a_state_leaks_across_a_document():
    real = CausalConv.forward
    CausalConv.forward = lambda self, x, ids, past, channels=None: real(self, x, None, past, channels)


@fault(FULL2)
def fsdp_takes_means_for_sums():
    from torch.distributed.fsdp import FSDPModule

    FSDPModule.set_gradient_divide_factor = lambda self, factor: None


@fault(DP2)
def gradients_of_the_last_microbatch_alone_count():
    def forgetful(self, modules, last, end):
        for parameter in self.parameters.values():
            parameter.grad = None

    data.Replicated.before_backward = forgetful


@fault(FULL2)
def microbatches_but_the_last_are_not_kept():
    real = data.Sharded.before_backward

    def forgetful(self, modules, last, end):
        self.reduce_every_microbatch = True
        for parameter in self.model.parameters():
            parameter.grad = None
        real(self, modules, last, end)

    data.Sharded.before_backward = forgetful


@fault(DP2)
def data_ranks_train_on_the_same_rows():
    parity.share_of = lambda batch, context: next(batch.split(batch.tokens.shape[0] // 2))


@fault(DP2)
def gradients_are_not_summed_over_data_ranks():
    data.sum_over_data_ranks = lambda parameters, context: None


@fault(Layout(data=4, shard=2, mode="hybrid"))
def copies_of_hsdp_train_apart():
    real = torch.distributed.all_reduce

    def between_others(tensor, *args, **kwargs):
        group = kwargs.get("group")
        return None if group is not None and group.size() == 2 and tensor.numel() > 1 else real(tensor, *args, **kwargs)

    torch.distributed.all_reduce = between_others


@fault(PP2)
def ends_of_a_pipeline_keep_their_own_gradient():
    data.sum_over_ends = lambda parameters, context: None


@fault(PP2, "tied")
def ends_of_a_pipeline_that_are_tied_keep_their_own_gradient():
    data.sum_over_ends = lambda parameters, context: None


@fault(PP2)
def both_ends_of_a_pipeline_count_in_the_norm():
    real = gradients._owned
    gradients._owned = lambda p, context: real(attach(p, replace(layout_of(p), end=None)), context)


@fault(PP2)
def the_norm_of_a_stage_is_taken_for_the_whole():
    real = gradients.gradient_norm
    parity.gradient_norm = lambda parameters, context: real(parameters, replace(context, pipeline=Group()))


@fault(PP2)
def every_microbatch_is_given_the_documents_of_the_first():
    """What torch does with keyword tensors: it hands them whole to each."""
    real = Batch.split

    def split(batch, size):
        parts = list(real(batch, size))
        return (replace(part, document_ids=parts[0].document_ids) for part in parts)

    Batch.split = split


def late(leaving: str):
    """Every microbatch is sent what the one before it should have been."""
    kind = {"leaving": "send", "leaving_gradients": "send_gradient"}[leaving]
    real, before = pipeline._DO[kind], {}

    def send(run, stage, microbatch):
        own = getattr(run, leaving)[stage, microbatch]
        getattr(run, leaving)[stage, microbatch] = before.get(stage, own)
        before[stage] = own
        real(run, stage, microbatch)

    pipeline._DO[kind] = send


@fault(PP2)
def gradients_go_back_into_the_wrong_microbatch():
    late("leaving_gradients")


@fault(Layout(pipeline=2, schedule="gpipe"))
def activations_come_in_the_wrong_order():
    late("leaving")


@fault(VPP2)
def layers_of_a_rank_run_before_those_of_the_next():
    real = build.staged

    def neighbours(config):
        (first, third), (second, fourth) = real(config)
        return (first, second), (third, fourth)

    build.staged = neighbours


@fault(PP2)
def layers_of_a_later_stage_start_as_those_of_the_first():
    from nemohybrid.model import init

    real = init.logical_name
    init.logical_name = lambda name, piece: (
        real(name, piece).replace("layers.3", "layers.1").replace("layers.2", "layers.0")
    )


@fault(PP2_FULL2)
def a_later_stage_does_not_send_its_gradients():
    data.Sharded.before_backward = lambda self, modules, last, end: [
        m.set_requires_gradient_sync(False) for m in (*modules, self.root)
    ]


@fault(VPP2)
def a_stage_forgets_what_it_was_given_back():
    real = pipeline._Run.send_gradient

    def forgetful(self, stage, microbatch):
        self.leaving_gradients[stage, microbatch].mul_(microbatch > 0)
        real(self, stage, microbatch)

    pipeline._DO["send_gradient"] = forgetful


@fault(RING2)
def a_state_begins_with_zeros_on_every_context_rank():
    shared_rows.carried = lambda left, decay, group: torch.zeros_like(left)


@fault(RING4)
def a_state_is_passed_on_to_the_next_rank_alone():
    real = states._summed_up
    states._summed_up = lambda left, decay, group, way: real(left, torch.zeros_like(decay), group, way)


@fault(RING2)
def the_gradient_of_a_state_stays_on_its_rank():
    real = states._summed_up
    states._summed_up = lambda left, decay, group, way: real(left, decay, group, way) * (way > 0)


@fault(RING4)
def the_decay_of_a_rank_gets_no_gradient():
    real = shared_rows.carried
    shared_rows.carried = lambda left, decay, group: real(left, decay.detach(), group)


@fault(RING2)
def a_convolution_sees_no_tokens_of_the_rank_before():
    shared_rows.from_left = lambda x, group: torch.zeros_like(x)


@fault(RING2)
def a_convolution_sees_another_document_on_the_rank_before():
    shared_rows._last_inputs = lambda mixer, xbc, seq: xbc[:, xbc.shape[1] - mixer.conv.weight.shape[-1] + 1 :]


@fault(RING2)
def a_document_goes_on_wherever_a_rank_begins():
    SequenceContext.goes_on_from_left = lambda seq: float(seq.context.rank > 0)


@fault(RING4)
def documents_have_the_numbers_that_their_rank_gives_them():
    real = sequence.borders

    def alone(ids, group):
        found = real(ids, group)
        return replace(found, segments=found.segments - found.segments[:, :1])

    sequence.borders = alone


@fault(RING2)
def keys_of_other_ranks_are_not_attended_to():
    real = ring._round
    ring._round = lambda kv, own, group: list(real(kv, own, group))[:1]


@fault(RING4)
def gradients_of_keys_end_on_the_neighbour():
    real = ring.gradients_of_part
    ring.gradients_of_part = lambda *given, **more: (
        real(*given, **more)[0],
        *(g.flip(0, 2) for g in real(*given, **more)[1:]),
    )


@fault(RING2)
def parts_of_an_attention_are_joined_as_equals():
    ring.join = lambda out, sums, more: ((out + more[0]) / 2, torch.logaddexp(sums, more[1]))


@fault(RING2, "latent")
def a_part_is_weighed_by_the_sum_over_its_own_keys():
    real = ring.gradients_of_part

    def alone(q, keys, out, sums, d_out, **more):
        own = ring.part_of_attention(q, keys)[1]
        return real(q, keys, out, own.where(own.isfinite(), sums), d_out, **more)

    ring.gradients_of_part = alone


@fault(HEADS2)
def heads_come_back_in_the_order_of_the_other_rank():
    real = shared_rows.to_tokens
    shared_rows.to_tokens = lambda x, group: real(x, group).roll(x.shape[-1], -1)


@fault(HEADS2)
def a_rank_takes_the_weights_of_the_first_heads():
    real = HeadsPart.of.__func__
    HeadsPart.of = classmethod(lambda cls, mixer, group, device: replace(real(cls, mixer, group, device), first=0))


@fault(HEADS2)
def heads_of_all_tokens_know_the_documents_of_their_own_alone():
    sequence.whole_rows = lambda values, group: values.repeat(1, group.size)


@fault(HEADS2)
def drafts_are_of_the_tokens_of_their_own_rank():
    real = batch.shifted
    batch.shifted = lambda values, by, group=None: real(values, by, Group())


@fault(RING2)
def the_balance_of_a_row_is_judged_by_the_tokens_of_a_context_rank():
    real = RouterLosses.arrived

    def alone(self, *args):
        self.context = replace(self.context, context=Group())
        return real(self, *args)

    RouterLosses.arrived = alone


@fault(RING2)
def context_ranks_train_on_the_same_tokens():
    Batch.shared_by = lambda self, context: (
        replace(self, context=context) if context.size == 1 else first_run(self, context)
    )


def first_run(whole, context):
    real = SHARED_BY
    return replace(real(whole, Group(context.size, 0, context.handle)), context=context)


@fault(EP2)
def gradients_of_experts_are_summed_over_ranks_that_have_others():
    real = gradients.sum_gradients
    data.sum_over_data_ranks = lambda parameters, context: real(parameters, context.data)


@fault(Layout(data=4, expert=2))
def gradients_of_experts_are_not_summed_over_their_copies():
    real = gradients.sum_over_data_ranks
    data.sum_over_data_ranks = lambda parameters, context: real(
        parameters, replace(context, experts=replace(context.experts, data=Group()))
    )


@fault(EP2)
def the_norm_of_experts_is_taken_over_the_wrong_ranks():
    real = gradients.gradient_norm
    parity.gradient_norm = lambda parameters, context: real(
        parameters, replace(context, experts=replace(context.experts, block=Group()))
    )


@fault(EP2)
def every_rank_starts_with_the_first_experts():
    from nemohybrid.model import init

    real = init.draw

    def first(box, target, seed, name):
        offsets = (0, *box.offsets[1:]) if "experts." in name else box.offsets
        real(replace(box, offsets=offsets), target, seed, name)

    init.draw = first


@fault(EP2)
def weights_of_visits_get_no_gradient():
    real = routes.Routes._collected

    def without(self, d_rows, d_weights):
        return real(self, d_rows, torch.zeros_like(d_weights))

    routes.Routes._collected = without


@fault(ETP2)
def summands_of_an_expert_are_not_summed():
    routes.Routes._by_token = lambda self, rows: self._gathered(rows)[:, :, 0].sum(1)


@fault(EP2)
def the_router_bias_follows_the_load_of_its_own_tokens():
    balance.sum_over = lambda tensor, group: tensor


@fault(Layout(data=4, expert=4, room=1.0))
def visits_that_found_no_room_are_forgotten():
    step.Attempts.was_short = lambda self, losses: False


@fault(Layout(tensor=2, sequence=True, expert=2))
def tensor_ranks_send_tokens_of_each_other():
    real = routes.Routes._of_tokens
    routes.Routes._of_tokens = lambda self, x: real(self, x.roll(1, 0))


@pytest.mark.parametrize("name", FAULTS)
def test_the_proof_sees_a_planted_fault(name):
    plant, layout, model = FAULTS[name]
    comparison = compare(layout, model, steps=2, before=plant)
    assert comparison.faults(1e-4), f"nobody saw that {name.replace('_', ' ')}"
    assert not comparison.failure, f"a fault that crashes is no silent one: {comparison.failure}"


def test_without_a_fault_the_same_comparison_finds_nothing():
    for layout in (TP2, TP2_SP, FULL2, PP2, VPP2, EP2, ETP2):
        assert compare(layout, steps=2).faults(1e-4) == []
