"""Collectives and a run in a process group of one: NCCL on a GPU, Gloo on the CPU.

`torchrun --nproc-per-node 1 -m pytest` of this file joins the job that torchrun started; alone, the tests start their own.
"""

import datetime
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from nemohybrid.checkpoint.world import World
from nemohybrid.model.hybrid import DTYPES, HybridModel
from nemohybrid.parallel.collectives import gather_bytes, sum_over
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.parallel.data import Sharded
from nemohybrid.parallel.world import choose_device
from nemohybrid.train.parity import share_of, synthetic_batch
from nemohybrid.train.run import run
from nemohybrid.train.state import run_tensors
from nemohybrid.train.step import compute_gradients


@pytest.fixture
def context(device, tmp_path) -> Iterator[ParallelContext]:
    place = choose_device(device, local_rank=0)
    backend, bound = ("nccl", place) if device == "cuda" else ("gloo", None)
    alone = {"init_method": f"file://{tmp_path}/store", "rank": 0, "world_size": 1}
    joining = {} if "RANK" in os.environ else alone
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=60), device_id=bound, **joining)
    yield ParallelContext(place, data=Group(1, 0, dist.group.WORLD))
    dist.destroy_process_group()


def test_every_collective_of_one_rank_returns_what_it_was_given(context):
    values = torch.arange(6.0, device=context.device)
    assert torch.equal(sum_over(values.clone(), context.data), values)
    gathered, scattered, received = torch.empty_like(values), torch.empty_like(values), values.clone()
    dist.all_gather([gathered], values)
    dist.reduce_scatter(scattered, [values])
    dist.broadcast(received, src=0)
    dist.barrier()
    for name, found in {"all_gather": gathered, "reduce_scatter": scattered, "broadcast": received}.items():
        assert torch.equal(found, values), name


def test_bytes_and_objects_come_back(context):
    assert gather_bytes(b"\x00abc", context.data, context.device) == [b"\x00abc"]
    assert World().exchange({"step": 3}) == [{"step": 3}]


def test_sums_in_bf16_and_of_many_elements_are_exact_for_one_rank(context):
    values = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0)).to(context.device, torch.bfloat16)
    assert torch.equal(sum_over(values.clone(), context.data), values)


def test_a_run_in_a_process_group_of_one_is_the_run_without_it(context, configure, tmp_path):
    def trained(where: ParallelContext, folder: str) -> dict[str, torch.Tensor]:
        config = configure(where.device.type, "model=tiny_moe", "train.steps=3", f"run.dir={tmp_path}/{folder}")
        trainer = run(config, where)
        return run_tensors(trainer.model, trainer.optimizer)

    with_group, without = trained(context, "group"), trained(ParallelContext.single(context.device), "single")
    different = [name for name, tensor in without.items() if not torch.equal(with_group[name], tensor)]
    assert not different, f"these tensors differ: {different}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_fsdp_holds_gets_the_gradients_of_a_plain_one(context, configure, dtype):
    """One rank has nothing to cut, but gathers, casts, streams and hooks are those of many. Two microbatches."""
    from torch.distributed.device_mesh import init_device_mesh

    config = configure(context.device.type, "model=tiny_latent_mtp", f"model.dtype={dtype}")
    batch = share_of(synthetic_batch(config, 0), context)
    plain = HybridModel.create(config.model, 1, context)
    wanted = compute_gradients(plain, batch, 2, context)
    with torch.device("meta"):
        model = HybridModel(config.model, context)
    meshed = replace(context, mesh=init_device_mesh(context.device.type, (1,)))
    shared = Sharded(model, meshed, [list(model.sharding_units())], entry="hidden_states", dtype=DTYPES[dtype])
    model.materialize(context.device, 1)
    losses = compute_gradients(model, batch, 2, context, shared)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=0)
    for name, parameter in plain.named_parameters():
        got, scale = shared.parameters[name].grad, parameter.grad.abs().max()
        assert (got - parameter.grad).abs().max() <= (1e-5 if dtype == "float32" else 2e-2) * scale, name
