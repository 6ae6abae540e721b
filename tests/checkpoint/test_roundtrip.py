"""What is saved comes back, bit for bit, through whatever strides it is loaded."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from nemohybrid.checkpoint import find_checkpoints, load_checkpoint, newest_complete, read_metadata, save_checkpoint
from nemohybrid.checkpoint.metadata import DTYPES
from nemohybrid.errors import CheckpointError


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern the dtype has, NaNs and infinities included."""
    count = torch.Size(shape).numel() * dtype.itemsize
    top = 2 if dtype == torch.bool else 256
    return torch.randint(0, top, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    flat = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_and_shape_returns_bit_for_bit(dtype, tmp_path):
    torch.manual_seed(1)
    shapes = [(), (0,), (3, 0, 2), (1,), (7,), (5, 3), (2, 3, 4)]
    # A byte-wide neighbour of odd length makes a careless writer misalign what follows.
    tensors = {"odd": torch.arange(3, dtype=torch.uint8)} | {f"t{s}": random_bits(s, dtype) for s in shapes}
    path = save_checkpoint(tmp_path, 1, tensors, {})
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_checkpoint(path, loaded)
    for name, tensor in tensors.items():
        assert same_bits(tensor, loaded[name]), f"{name} of {dtype} changed"


def test_views_are_saved_and_loaded_through_and_their_neighbours_are_left_alone(tmp_path):
    fused = torch.arange(48.0).reshape(6, 8).requires_grad_()
    pieces = {"z": fused[:2], "B": fused[2:, 1:4], "transposed": fused[2:, 4:7].t(), "column": fused[:, 7]}
    path = save_checkpoint(tmp_path, 1, pieces, {})
    target = torch.full((6, 8), -1.0, requires_grad=True)
    views = {"z": target[:2], "B": target[2:, 1:4], "transposed": target[2:, 4:7].t(), "column": target[:, 7]}
    load_checkpoint(path, views)
    expected = fused.detach().clone()
    expected[2:, 0] = -1.0
    assert torch.equal(target, expected)


def test_a_view_of_one_value_or_none_is_saved_whatever_its_strides(tmp_path):
    memory = torch.arange(12.0).reshape(3, 4)
    tensors = {"one": memory[:1, 2], "none": memory[:0, 2], "corner": memory[1:2, 3:]}
    path = save_checkpoint(tmp_path, 1, tensors, {})
    loaded = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    load_checkpoint(path, loaded)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_parameter_under_two_names_is_saved_under_both(tmp_path):
    tied = torch.nn.Parameter(torch.randn(4, 3))
    path = save_checkpoint(tmp_path, 1, {"embedding": tied, "output": tied}, {})
    loaded = {"embedding": torch.zeros(4, 3), "output": torch.zeros(4, 3)}
    load_checkpoint(path, loaded)
    assert torch.equal(loaded["embedding"], tied)
    assert torch.equal(loaded["output"], tied)


def test_files_stay_under_the_limit_and_are_plain_safetensors(tmp_path, monkeypatch):
    monkeypatch.setattr("nemohybrid.checkpoint.save.SafetensorsWriter.__init__.__defaults__", (100,))
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)} | {"large": torch.ones(100)}
    path = save_checkpoint(tmp_path, 1, tensors, {})
    shards = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    assert [len(shard) for shard in shards] == [2, 2, 2, 1, 1], "40-byte tensors in files of at most 100 bytes"
    for name, tensor in (item for shard in shards for item in shard.items()):
        assert torch.equal(tensor, tensors[name]), f"another safetensors reader sees a different {name}"
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_checkpoint(path, loaded)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_every_tensor_of_a_file_begins_at_a_multiple_of_its_width(tmp_path):
    widths = {
        "odd": torch.uint8,
        "half": torch.bfloat16,
        "wide": torch.float64,
        "bits": torch.bool,
        "plain": torch.float32,
    }
    path = save_checkpoint(tmp_path, 1, {name: torch.ones(3, dtype=dtype) for name, dtype in widths.items()}, {})
    raw = (path / "rank00000-00000.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begins = {name: 8 + length + header[name]["data_offsets"][0] for name in widths}
    assert {name: begins[name] % dtype.itemsize for name, dtype in widths.items()} == dict.fromkeys(widths, 0)


def test_the_state_returns_exactly(tmp_path):
    generator = random.Random(2)
    floats = [generator.uniform(-1, 1) * 10.0 ** generator.randint(-300, 300) for _ in range(500)]
    state = {
        "step": 3,
        "floats": [*floats, 5e-324, -0.0, 0.1],
        "big": 2**70,
        "text": "é\ud800\n",
        "none": None,
        "yes": True,
    }
    path = save_checkpoint(tmp_path, 3, {}, state)
    loaded = load_checkpoint(path, {})
    assert loaded == state
    assert [value.hex() for value in loaded["floats"]] == [value.hex() for value in state["floats"]]


@pytest.mark.parametrize(
    "state, place",
    [
        ({"loss": [1.0, float("nan")]}, r"state.loss\[1\] is nan"),
        ({"a": {"b": float("inf")}}, "state.a.b is inf"),
        ({"a": (1, 2)}, "state.a is a tuple"),
        ({"a": {1: 2}}, "state.a: key 1"),
        ({"a": torch.ones(1)}, "state.a is a Tensor"),
    ],
)
def test_a_state_that_would_not_return_is_refused_with_its_place(state, place, tmp_path):
    with pytest.raises(CheckpointError, match=place):
        save_checkpoint(tmp_path, 1, {}, state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, tensor, reason",
    [
        ("w", [1.0], "w is a list, no tensor"),
        ("w", torch.ones(2, dtype=torch.complex64), "complex64. Legal: .*bfloat16"),
        ("w", torch.ones(2, device="meta"), "meta device"),
        ("w", torch.eye(2).to_sparse(), "sparse"),
        ("a@0", torch.ones(2), "without '@'"),
        ("", torch.ones(2), "non-empty"),
    ],
)
def test_a_tensor_that_cannot_be_saved_is_refused_by_name(name, tensor, reason, tmp_path):
    with pytest.raises(CheckpointError, match=reason):
        save_checkpoint(tmp_path, 1, {name: tensor}, {})


def test_extra_files_are_copied_whatever_they_are_given_as(tmp_path):
    source = tmp_path / "elsewhere.json"
    source.write_bytes(bytes(range(256)) * 8192)
    extra = {"tokenizer.json": source, "config.yaml": "größe: 1\n", "raw.bin": b"\0\1"}
    path = save_checkpoint(tmp_path / "run", 1, {}, {}, extra)
    assert (path / "tokenizer.json").read_bytes() == source.read_bytes()
    assert (path / "config.yaml").read_text(encoding="utf-8") == "größe: 1\n"
    assert (path / "raw.bin").read_bytes() == b"\0\1"


@pytest.mark.parametrize(
    "name", ["../up", "/abs", "a/b", ".hidden", "", "state.json", "manifest.json", "metadata.json", "x.safetensors"]
)
def test_extra_files_keep_to_plain_names_of_their_own(name, tmp_path):
    with pytest.raises(CheckpointError, match="extra file"):
        save_checkpoint(tmp_path / "run", 1, {}, {}, {name: "text"})


def test_metadata_tells_names_shapes_and_dtypes_without_loading(template, tensors_of):
    records = read_metadata(find_checkpoints(template)[0])
    expected = {name: (tuple(t.shape), t.dtype) for name, t in tensors_of(2).items()}
    assert {name: (record.shape, record.dtype) for name, record in records.items()} == expected


def test_everything_that_does_not_fit_is_listed_before_a_tensor_is_touched(template):
    tensors = {
        "model.wieght": torch.zeros(6, 4),
        "model.norm": torch.zeros(3),
        "optimizer.step": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(find_checkpoints(template)[0], tensors)
    for expected in (
        "4 problems",
        "model.wieght is not in the checkpoint. Did you mean 'model.weight'?",
        "model.weight is in the checkpoint and was not asked for",
        "model.norm is torch.float32 here and torch.bfloat16 in the checkpoint",
        "optimizer.step has shape [2] here and [] in the checkpoint",
    ):
        assert expected in str(caught.value)
    assert all(tensor.abs().sum() == 0 for tensor in tensors.values())


def test_prefixes_may_be_left_out_on_either_side(template, tensors_of):
    path = find_checkpoints(template)[0]
    tensors = {name: torch.zeros_like(t) for name, t in tensors_of(2).items() if name.startswith("model.")}
    tensors["new.weight"] = torch.full((2,), 7.0)
    state = load_checkpoint(path, tensors, allow_missing=("new.",), allow_unexpected=("optimizer.",))
    assert state == {"version": 2}
    assert torch.equal(tensors["model.weight"], tensors_of(2)["model.weight"])
    assert torch.equal(tensors["new.weight"], torch.full((2,), 7.0)), "a missing tensor keeps its values"


def test_the_same_step_can_be_saved_again(tmp_path, tensors_of):
    for version in (1, 2, 3):
        path = save_checkpoint(tmp_path, 20, tensors_of(version), {"version": version})
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000020"]
    loaded = tensors_of(0)
    assert load_checkpoint(path, loaded) == {"version": 3}
    assert torch.equal(loaded["model.weight"], tensors_of(3)["model.weight"])


def test_checkpoints_are_found_newest_first_and_strangers_are_ignored(template, tmp_path):
    for name in ("step_00000003", "step_00000100", ".tmp-step_00000200", "step_7", "other", "step_100000000"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000300").write_text("a file")
    names = [path.name for path in find_checkpoints(tmp_path)]
    assert names == ["step_100000000", "step_00000100", "step_00000003"]
    assert newest_complete(tmp_path / "absent") is None


def test_saving_twice_gives_the_same_bytes(tmp_path, tensors_of):
    folders = [save_checkpoint(tmp_path / name, 1, tensors_of(1), {"a": 1}) for name in ("first", "second")]
    assert (folders[0] / "manifest.json").read_bytes() == (folders[1] / "manifest.json").read_bytes()
    assert json.loads((folders[0] / "manifest.json").read_text())["format"] == 1
