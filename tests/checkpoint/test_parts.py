"""Ranks that hold several boxes of a tensor, or none, save it; any other cut of it loads exactly what was saved."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemohybrid.checkpoint import (
    SafetensorsWriter,
    find_checkpoints,
    load_checkpoint,
    read_metadata,
    save_checkpoint,
    storage,
)
from nemohybrid.checkpoint.folders import step_folder, temporary
from nemohybrid.checkpoint.planner import PartsSavePlanner
from nemohybrid.checkpoint.save import complete, make_temporary
from nemohybrid.errors import CheckpointError
from nemohybrid.parallel.layout import Parts

Slices = tuple[slice, ...]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TABLE = torch.arange(24.0).reshape(6, 4)


def parts(whole: Tensor, *boxes: Slices) -> Parts:
    """These boxes of `whole`, each in memory of its own where a foreign -1 follows every value."""
    return Parts(tuple(whole.shape), tuple((tuple(cut.start for cut in box), spread(whole[box])) for box in boxes))


def spread(values: Tensor) -> Tensor:
    memory = torch.full((*values.shape, 2), -1, dtype=values.dtype)
    memory[..., 0] = values
    return memory[..., 0]


def rows(begin: int, end: int, columns: int = 4) -> Slices:
    return slice(begin, end), slice(0, columns)


def blank(tensors: dict[str, Parts]) -> dict[str, Parts]:
    """The same boxes with other values."""
    return {
        name: Parts(held.shape, tuple((offsets, spread(torch.full_like(view, -1))) for offsets, view in held.boxes))
        for name, held in tensors.items()
    }


def assert_same(loaded: dict[str, Parts], expected: dict[str, Parts]) -> None:
    for name, held in expected.items():
        for (offsets, view), (_, wanted) in zip(loaded[name].boxes, held.boxes, strict=True):
            assert torch.equal(view, wanted), f"{name} at {offsets} came back as {view}"
            memory = view._base
            assert memory is not None
            assert bool((memory[..., 1] == -1).all()), f"{name} at {offsets} was written beyond its view"


def assert_loads_whole(path: Path, **expected: Tensor) -> None:
    tensors = {name: torch.full_like(tensor, -1) for name, tensor in expected.items()}
    load_checkpoint(path, tensors)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), f"{name} came back as {tensors[name]}"


def test_a_fused_tensor_of_which_each_rank_holds_two_boxes_loads_whole(tmp_path, run_ranks):
    gate_and_up = torch.arange(36.0).reshape(12, 3)

    def save(rank: int) -> None:
        first = 3 * rank
        local = torch.full((6, 5), -1.0)  # what a rank stores: its part of both halves, beside something else
        local[:3, :3], local[3:, :3] = gate_and_up[first : first + 3], gate_and_up[6 + first : 9 + first]
        held = Parts((12, 3), (((first, 0), local[:3, :3]), ((6 + first, 0), local[3:, :3])))
        save_checkpoint(tmp_path, 1, {"fused": held}, {"saved": "by two"})

    run_ranks(2, save)
    (path,) = find_checkpoints(tmp_path)
    assert [chunk.offsets for chunk in read_metadata(path)["fused"].chunks] == [(0, 0), (3, 0), (6, 0), (9, 0)]
    assert_loads_whole(path, fused=gate_and_up)


def grid(rank: int) -> dict[str, Parts]:
    """A 2 x 2 cut of one tensor, halves of another on two ranks each, and one that all hold."""
    down, right = divmod(rank, 2)
    return {
        "grid": parts(TABLE, (slice(3 * down, 3 * down + 3), slice(2 * right, 2 * right + 2))),
        "halves": parts(TABLE + 100, rows(3 * right, 3 * right + 3)),
        "whole": parts(TABLE + 200, rows(0, 6)),
    }


def test_a_cut_of_four_ranks_with_replicas_loads_into_rows_of_three_and_into_one(tmp_path, run_ranks):
    run_ranks(4, lambda rank: save_checkpoint(tmp_path, 1, grid(rank), {}))
    (path,) = find_checkpoints(tmp_path)

    def load(rank: int) -> None:
        begin, end = ((0, 1), (1, 5), (5, 6))[rank]
        wholes = {"grid": TABLE, "halves": TABLE + 100, "whole": TABLE + 200}
        expected = {name: parts(whole, rows(begin, end)) for name, whole in wholes.items()}
        loaded = blank(expected)
        load_checkpoint(path, loaded)
        assert_same(loaded, expected)

    run_ranks(3, load)
    assert_loads_whole(path, grid=TABLE, halves=TABLE + 100, whole=TABLE + 200)


def test_a_box_on_several_ranks_is_written_once_and_the_ranks_share_the_work(tmp_path, run_ranks):
    whole = torch.arange(1000.0)

    def save(rank: int) -> None:
        halves = parts(whole, (slice(0, 500),), (slice(500, 1000),))
        save_checkpoint(tmp_path, 1, {"a": halves, "b": parts(whole, (slice(0, 1000),))}, {})

    run_ranks(4, save)
    (path,) = find_checkpoints(tmp_path)
    records = read_metadata(path)
    assert [chunk.key for chunk in records["a"].chunks] == ["a@0", "a@500"]
    assert [chunk.key for chunk in records["b"].chunks] == ["b"], "all of a tensor goes by its plain name"
    sizes = sorted(file.stat().st_size for file in path.glob("*.safetensors"))
    assert [size // 1000 for size in sizes] == [2, 2, 4], f"8000 bytes on three of four ranks, once: {sizes}"
    assert_loads_whole(path, a=whole, b=whole)


def test_ranks_may_hold_nothing_of_a_tensor_or_not_even_know_it(tmp_path, run_ranks):
    def tensors_of(rank: int) -> dict[str, Parts]:
        known = {} if rank == 2 else {"known to two": parts(TABLE, *[rows(0, 6)] * (rank == 1))}
        return {"last": parts(TABLE, *[rows(0, 6)] * (rank == 2)), "empty box": empty_or_all(rank)} | known

    def empty_or_all(rank: int) -> Parts:  # both begin at 0, and only one of them has values
        return parts(TABLE, rows(0, 6 if rank == 1 else 0))

    def save_and_load(rank: int) -> None:
        expected = tensors_of(rank)
        path = save_checkpoint(tmp_path, 1, expected, {})
        loaded = blank(expected)
        load_checkpoint(path, loaded)
        assert_same(loaded, expected)

    run_ranks(3, save_and_load)
    (path,) = find_checkpoints(tmp_path)
    assert_loads_whole(path, **{"last": TABLE, "known to two": TABLE, "empty box": TABLE})


def test_dtypes_and_scalars_return_beside_plain_tensors(tmp_path, run_ranks):
    values = {
        "bf16": torch.linspace(-3, 3, 24).reshape(6, 4).bfloat16(),
        "int64": torch.arange(24).reshape(6, 4) * 2**40,
    }
    scalars = {"step": torch.tensor(2**53 + 1), "scale": torch.tensor(0.1, dtype=torch.bfloat16)}

    def tensors_of(rank: int) -> dict[str, Parts]:
        cut = {name: parts(whole, rows(3 * rank, 3 * rank + 3)) for name, whole in values.items()}
        return cut | {name: parts(scalar, ()) for name, scalar in scalars.items()}

    def save_and_load(rank: int) -> None:
        path = save_checkpoint(tmp_path, 1, tensors_of(rank) | {"plain": TABLE, f"own.{rank}": torch.ones(rank)}, {})
        loaded = blank(tensors_of(rank))
        load_checkpoint(path, loaded | {"plain": torch.zeros(6, 4), f"own.{rank}": torch.zeros(rank)})
        assert_same(loaded, tensors_of(rank))

    run_ranks(2, save_and_load)
    (path,) = find_checkpoints(tmp_path)
    assert_loads_whole(path, **values, **scalars, plain=TABLE, **{"own.0": torch.ones(0), "own.1": torch.ones(1)})


FAULTS = {
    "missing box": (
        [parts(TABLE, rows(0, 2)), parts(TABLE, rows(4, 6))],
        r"no rank holds w\[2:4, 0:4\]: 8 of 24 values are missing",
    ),
    "overlap": (
        [parts(TABLE, rows(0, 4)), parts(TABLE, rows(2, 6))],
        r"w\[0:4, 0:4\] of rank 0 and w\[2:6, 0:4\] of rank 1 overlap",
    ),
    "overlap from the same place": ([parts(TABLE, rows(0, 6)), parts(TABLE, rows(0, 3))], "rank 1 overlap"),
    "overlap that hides a gap": ([parts(TABLE, rows(0, 4)), parts(TABLE, rows(3, 5))], "rank 1 overlap"),
    "dtypes": (
        [parts(TABLE, rows(0, 3)), parts(TABLE.bfloat16(), rows(3, 6))],
        r"w is torch\.float32 on rank 0 and torch\.bfloat16 on rank 1",
    ),
    "dtypes on one rank": (
        [
            parts(TABLE, rows(0, 3)),
            Parts((6, 4), (*parts(TABLE, rows(3, 4)).boxes, *parts(TABLE.bfloat16(), rows(4, 6)).boxes)),
        ],
        r"rank 1: w has boxes of torch\.bfloat16 and of torch\.float32",
    ),
    "shapes": (
        [parts(TABLE, rows(0, 6)), Parts((6, 5), ())],
        r"w has shape \[6, 4\] on rank 0 and \[6, 5\] on rank 1",
    ),
    "nobody": ([Parts((6, 4), ()), Parts((6, 4), ())], "no rank holds any of w"),
    "nobody has the scalar": ([Parts((), ()), Parts((), ())], "no rank holds any of w"),
    "meta device": (
        [
            parts(TABLE, rows(0, 3)),
            Parts((6, 4), (*parts(TABLE, rows(3, 4)).boxes, ((4, 0), torch.empty(2, 4, device="meta")))),
        ],
        "rank 1: w is sparse or on the meta device",
    ),
    "plain tensors": ([TABLE, TABLE[:3]], r"w has shape \[6, 4\] on rank 0 and \[3, 4\] on rank 1"),
    "plain and parts": ([TABLE, parts(TABLE, rows(2, 6))], "rank 1 overlap"),
}


@pytest.mark.parametrize("held, message", FAULTS.values(), ids=FAULTS.keys())
def test_what_is_not_a_whole_tensor_is_refused_by_name_on_all_ranks(held, message, tmp_path, run_ranks):
    def save(rank: int) -> None:
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(tmp_path, 1, {"fine": TABLE, "w": held[rank]}, {})

    run_ranks(2, save)
    assert list(tmp_path.iterdir()) == [], "nothing is published, and no litter stays"


def test_one_process_alone_must_hold_everything(tmp_path):
    message = r"no rank holds v\[3:6, 0:4\]: 12 of 24 values are missing \(the first of 2 tensors"
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, 1, {"v": parts(TABLE, rows(0, 3)), "w": Parts((6, 4), ()), "fine": TABLE}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "held, message",
    [
        (Parts((5, 4), ()), r"w has shape \[5, 4\] here and \[6, 4\] in the checkpoint"),
        (parts(TABLE.bfloat16(), rows(0, 1)), "w is torch.bfloat16 here and torch.float32 in the checkpoint"),
        (Parts((6, 4), (((0, 0), torch.empty(1, 4, device="meta")),)), "w is on the meta device"),
    ],
    ids=["shape", "dtype", "meta device"],
)
def test_parts_that_do_not_fit_are_refused_on_all_ranks_before_a_box_is_touched(held, message, tmp_path, run_ranks):
    path = save_checkpoint(tmp_path, 1, {"w": TABLE}, {})

    def load(rank: int) -> None:
        fitting = parts(torch.zeros(6, 4), rows(0, 6))
        with pytest.raises(CheckpointError, match=f"(?s)rank 1: .*{message}"):
            load_checkpoint(path, {"w": held if rank else fitting})
        assert fitting.boxes[0][1].abs().sum() == 0

    run_ranks(2, load)


@pytest.mark.parametrize(
    "held, message",
    [
        (Parts((6, 4), (((4, 0), torch.ones(3, 4)),)), r"a box from \[4, 0\] to \[7, 4\] reaches beyond it"),
        (Parts((6, 4), (((0, -1), torch.ones(6, 4)),)), "reaches beyond it"),
        (Parts((6, 4), (((0,), torch.ones(6)),)), "number of dimensions"),
        (Parts((6, 4), (((0, 0), torch.ones(6, 4)), ((0, 0), torch.ones(1, 4)))), "begin at the same place"),
    ],
    ids=["beyond the end", "before the start", "dimensions", "twice"],
)
def test_boxes_that_cannot_be_of_the_tensor_are_our_mistake(held, message, tmp_path):
    path = save_checkpoint(tmp_path / "sound", 1, {"w": TABLE}, {})
    with pytest.raises(AssertionError, match=message):
        save_checkpoint(tmp_path / "faulty", 1, {"w": held}, {})
    with pytest.raises(AssertionError, match=message):
        load_checkpoint(path, {"w": held})


def test_a_box_is_copied_by_itself_and_nothing_else_is_read(tmp_path, monkeypatch):
    written, read = [], []
    tensor_bytes, read_box = storage.tensor_bytes, storage.read_box
    monkeypatch.setattr(
        storage, "tensor_bytes", lambda tensor: (written.append(tensor.numel()), tensor_bytes(tensor))[1]
    )
    path = save_checkpoint(tmp_path, 1, {"w": parts(TABLE, rows(0, 2), rows(2, 6))}, {})
    monkeypatch.setattr(storage, "read_box", lambda *args: (read.append(args[2].lengths.numel()), read_box(*args))[1])
    expected = {"w": parts(TABLE, rows(1, 3, 2))}
    loaded = blank(expected)
    load_checkpoint(path, loaded)
    assert_same(loaded, expected)
    assert (written, read) == ([8, 16], [2, 2])


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Slices]:
    """A tensor cut again and again; some boxes are empty."""
    boxes: list[Slices] = [tuple(slice(0, size) for size in shape)]
    cuts = st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 5))
    for which, axis, place in draw(st.lists(cuts, max_size=6)) if shape else []:
        box, axis = boxes.pop(which % len(boxes)), axis % len(shape)
        middle = min(box[axis].start + place, box[axis].stop)
        halves = slice(box[axis].start, middle), slice(middle, box[axis].stop)
        boxes += [(*box[:axis], half, *box[axis + 1 :]) for half in halves]
    return boxes


@st.composite
def saved_and_wanted(draw: st.DrawFn) -> tuple[Tensor, list[list[Slices]], list[Slices]]:
    """A tensor, the boxes that each of three ranks saves, replicas among them, and those that are wanted."""
    shape = draw(SHAPES)
    boxes = draw(tilings(shape))
    holders = [draw(st.sets(st.integers(0, 2), min_size=1)) for _ in boxes]
    saved = [[box for box, ranks in zip(boxes, holders, strict=True) if rank in ranks] for rank in range(3)]
    return torch.arange(torch.Size(shape).numel()).reshape(shape), saved, draw(tilings(shape))


def save_as_ranks(root: Path, tensors: list[dict[str, Parts]]) -> Path:
    """What `save_checkpoint` does on several ranks, one after the other in this process."""
    final = step_folder(root, 1)
    temp = temporary(final)
    make_temporary(temp)
    writer, planners = SafetensorsWriter(temp), [PartsSavePlanner() for _ in tensors]
    for planner, held in zip(planners, tensors, strict=True):
        planner.set_up_planner(dict(held))
    plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    numbered = zip(writer.prepare_global_plan(plans), planners, strict=True)
    writer.finish(
        metadata, [writer.write_data(planner.finish_plan(plan), planner).value() for plan, planner in numbered]
    )
    complete(temp, final, 1, writer.files, {}, {})
    return final


@settings(max_examples=60, deadline=None)
@given(case=saved_and_wanted())
def test_any_tiling_saves_and_any_other_loads_it(case, tmp_path_factory):
    whole, saved, wanted = case
    path = save_as_ranks(tmp_path_factory.mktemp("tiling"), [{"w": parts(whole, *boxes)} for boxes in saved])
    chunks = [(chunk.offsets, chunk.shape) for chunk in read_metadata(path)["w"].chunks if 0 not in chunk.shape]
    distinct = {str(box) for box in itertools.chain(*saved) if whole[box].numel()}
    assert len(chunks) == len(distinct), "every box is written once"
    for boxes in (wanted[::2], wanted[1::2]):
        expected = {"w": parts(whole, *boxes)}
        loaded = blank(expected)
        load_checkpoint(path, loaded, verify_files=False)
        assert_same(loaded, expected)
