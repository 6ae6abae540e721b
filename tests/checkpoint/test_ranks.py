"""Several ranks save one checkpoint, agree on every failure, and another number of ranks loads it."""

import errno
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nemohybrid.checkpoint import (
    find_checkpoints,
    load_checkpoint,
    newest_complete,
    prune,
    read_metadata,
    save_checkpoint,
)
from nemohybrid.errors import CheckpointError

GLOBAL = {
    "even": torch.arange(24.0).reshape(6, 4),
    "uneven": torch.arange(35.0).reshape(5, 7),
    "one row": torch.arange(3, dtype=torch.int64).reshape(1, 3),
    "cube": torch.arange(60, dtype=torch.bfloat16).reshape(3, 4, 5),
    "scalar": torch.tensor(2.5),
}
DIMENSION = {"even": 0, "uneven": 1, "one row": 0, "cube": 2}


def sharded(values: dict[str, torch.Tensor], size: int, shift: int = 0) -> dict[str, DTensor]:
    """Every tensor cut over `size` ranks along its own dimension, `shift` dimensions further on."""
    mesh = init_device_mesh("cpu", (size,))

    def cut(name: str, tensor: torch.Tensor) -> DTensor:
        placement = Shard((DIMENSION[name] + shift) % tensor.ndim) if name in DIMENSION else Replicate()
        return distribute_tensor(tensor, mesh, [placement])

    return {name: cut(name, tensor) for name, tensor in values.items()}


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in GLOBAL.items()}


def assert_global(tensors: dict[str, torch.Tensor]) -> None:
    for name, expected in GLOBAL.items():
        assert torch.equal(tensors[name], expected), f"{name} came back as {tensors[name]}"


def test_shards_saved_by_two_ranks_load_into_one(tmp_path, run_ranks):
    run_ranks(2, lambda rank: save_checkpoint(tmp_path, 1, sharded(GLOBAL, 2), {"saved": "by two"}))
    (path,) = find_checkpoints(tmp_path)
    assert sorted(file.name[:9] for file in path.glob("*.safetensors")) == ["rank00000", "rank00001"]
    assert len(read_metadata(path)["uneven"].chunks) == 2
    loaded = zeros()
    assert load_checkpoint(path, loaded) == {"saved": "by two"}
    assert_global(loaded)


@pytest.mark.parametrize("size", [2, 3])
def test_shards_load_under_another_cut_and_number_of_ranks(size, tmp_path, run_ranks):
    run_ranks(2, lambda rank: save_checkpoint(tmp_path, 1, sharded(GLOBAL, 2), {}))

    def load(rank: int) -> None:
        newest = newest_complete(tmp_path)
        assert newest is not None
        tensors = sharded(zeros(), size, shift=1)
        load_checkpoint(newest.path, tensors, verify_files=False)
        assert_global({name: tensor.full_tensor() for name, tensor in tensors.items()})

    run_ranks(size, load)


def test_one_ranks_checkpoint_loads_into_shards(tmp_path, run_ranks):
    path = save_checkpoint(tmp_path, 1, GLOBAL, {})

    def load(rank: int) -> None:
        tensors = sharded(zeros(), 2)
        load_checkpoint(path, tensors)
        assert_global({name: tensor.full_tensor() for name, tensor in tensors.items()})

    run_ranks(2, load)


def test_replicated_tensors_are_written_once_and_each_ranks_own_come_back_to_it(tmp_path, run_ranks):
    def save_and_load(rank: int) -> None:
        tensors = {"weight": torch.ones(1000), "bias": torch.ones(1000), f"rng.{rank}": torch.tensor(rank)}
        path = save_checkpoint(tmp_path, 1, tensors, {"rank": rank})
        loaded = {name: torch.full_like(tensor, -1) for name, tensor in tensors.items()}
        assert load_checkpoint(path, loaded) == {"rank": 0}
        assert all(torch.equal(tensors[name], loaded[name]) for name in tensors)

    run_ranks(2, save_and_load)
    (path,) = find_checkpoints(tmp_path)
    sizes = [file.stat().st_size for file in sorted(path.glob("*.safetensors"))]
    assert len(sizes) == 2
    assert all(4000 < size < 4500 for size in sizes), f"the ranks share two tensors of 4000 bytes: {sizes}"


def test_a_full_disk_on_one_rank_fails_all_and_leaves_no_litter(tmp_path, run_ranks):
    def save(rank: int) -> None:
        save_checkpoint(tmp_path, 1, sharded(GLOBAL, 2), {})
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(os, "fsync", fail)
            with pytest.raises(CheckpointError, match=r"rank 1: .*No space left.*Free some space"):
                save_checkpoint(tmp_path, 2, sharded(GLOBAL, 2), {})

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run_ranks(2, save)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_disk_that_is_not_shared_is_found_when_saving(tmp_path, run_ranks):
    def save(rank: int) -> None:
        own = tmp_path / str(rank)
        (own / ".tmp-step_00000001").mkdir(parents=True)
        with pytest.raises(CheckpointError, match=r"rank00001-00000\.safetensors is missing"):
            save_checkpoint(own, 1, sharded(GLOBAL, 2), {})

    run_ranks(2, save)


def test_a_misfit_on_one_rank_is_raised_on_all(tmp_path, run_ranks):
    path = save_checkpoint(tmp_path, 1, {"w": torch.ones(2)}, {})

    def load(rank: int) -> None:
        tensors = {"w": torch.zeros(2 + rank)}
        with pytest.raises(CheckpointError, match=r"(?s)rank 1: .*w has shape \[3\] here and \[2\]"):
            load_checkpoint(path, tensors)
        assert tensors["w"].abs().sum() == 0

    run_ranks(2, load)


def test_stages_that_ask_for_different_names_ask_for_them_together(tmp_path, run_ranks):
    path = save_checkpoint(tmp_path, 1, {"layer.0": torch.ones(2), "layer.1": torch.ones(3), "lost": torch.ones(1)}, {})

    def load(rank: int) -> None:
        tensors = {f"layer.{rank}": torch.zeros(2 + rank)}
        with pytest.raises(CheckpointError, match=r"\(1 problem\):\n.*lost is in the checkpoint"):
            load_checkpoint(path, tensors)
        load_checkpoint(path, tensors, allow_unexpected=("lost",))
        assert tensors[f"layer.{rank}"].sum() == 2 + rank

    run_ranks(2, load)


def test_all_ranks_pass_over_the_same_damaged_checkpoint(tmp_path, run_ranks):
    def agree(rank: int) -> None:
        for step in (1, 2, 3):
            save_checkpoint(tmp_path, step, sharded(GLOBAL, 2), {})
        shard = tmp_path / "step_00000003" / "rank00001-00000.safetensors"
        if rank == 0:
            shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
        dist.barrier()
        newest = newest_complete(tmp_path)
        assert newest is not None
        assert newest.path.name == "step_00000002"
        assert "rank00001-00000.safetensors is damaged" in newest.skipped[0][1]
        assert [path.name for path in prune(tmp_path, keep=1)] == ["step_00000001"]

    run_ranks(2, agree)


def test_a_process_group_can_save_beside_the_rest_of_the_world(tmp_path, run_ranks):
    def save(rank: int) -> None:
        group = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "shard")).get_group("shard")
        path = save_checkpoint(tmp_path / str(rank), 1, {"w": torch.tensor(rank)}, {}, process_group=group)
        loaded = {"w": torch.tensor(-1)}
        load_checkpoint(path, loaded, process_group=group)
        assert loaded["w"] == rank

    run_ranks(2, save)
