"""Damage is found and named before any tensor is touched, and an older sound checkpoint takes over."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid.checkpoint import load_checkpoint, newest_complete, save_checkpoint, verify
from nemohybrid.errors import CheckpointError

FILES = [
    "config.yaml",
    "manifest.json",
    "metadata.json",
    "rank00000-00000.safetensors",
    "state.json",
    "tokenizer.json",
]


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


DAMAGES = {
    "first byte": lambda path: rewrite(path, lambda raw: bytes([raw[0] ^ 1]) + raw[1:]),
    "last byte": lambda path: rewrite(path, lambda raw: raw[:-1] + bytes([raw[-1] ^ 0x80])),
    "shorter": lambda path: rewrite(path, lambda raw: raw[:-1]),
    "longer": lambda path: rewrite(path, lambda raw: raw + b" "),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "zeroed": lambda path: rewrite(path, lambda raw: bytes(len(raw))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: path.symlink_to(path.rename(path.parent.parent / "elsewhere")),
}


@pytest.fixture
def root(template, tmp_path) -> Path:
    return shutil.copytree(template, tmp_path / "run")


@pytest.fixture(scope="module")
def scratch(template, tmp_path_factory) -> Path:
    """A checkpoint to damage and mend again."""
    return shutil.copytree(template / "step_00000020", tmp_path_factory.mktemp("scratch") / "step_00000020")


def assert_found(root: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """The newest checkpoint is refused with `name`, leaves `tensors` alone, and the one before it is taken."""
    path = root / "step_00000020"
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=name):
        verify(path)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path, tensors)
    assert all(torch.equal(before[key], tensors[key]) for key in tensors), (
        "tensors were touched before the damage was found"
    )
    newest = newest_complete(root)
    assert newest is not None
    assert newest.path.name == "step_00000010"
    (skipped, reason), *others = newest.skipped
    assert skipped == path
    assert name in reason
    assert not others


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_to_any_file_is_named_and_the_one_before_is_taken(name, damage, root, tensors_of):
    damage(root / "step_00000020" / name)
    assert_found(root, name, tensors_of(0))


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_any_flipped_byte_is_named(scratch, name, place, mask):
    path = scratch / name
    sound = path.read_bytes()
    at = int(place * len(sound))
    try:
        path.write_bytes(sound[:at] + bytes([sound[at] ^ mask]) + sound[at + 1 :])
        with pytest.raises(CheckpointError, match=name):
            verify(scratch)
    finally:
        path.write_bytes(sound)


@pytest.mark.parametrize("one, other", list(itertools.combinations(FILES, 2)))
def test_two_files_that_changed_places_are_found(one, other, root, tensors_of):
    folder = root / "step_00000020"
    (folder / one).rename(folder / "third")
    (folder / other).rename(folder / one)
    (folder / "third").rename(folder / other)
    with pytest.raises(CheckpointError, match=f"({one}|{other})"):
        load_checkpoint(folder, tensors_of(0))


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_found(name, root, tensors_of):
    same = (root / "step_00000010" / name).read_bytes() == (root / "step_00000020" / name).read_bytes()
    shutil.copy(root / "step_00000010" / name, root / "step_00000020" / name)
    if same:
        verify(root / "step_00000020")
    else:
        assert_found(root, name, tensors_of(0))


def test_a_checkpoint_under_another_steps_name_is_found(root, tensors_of):
    shutil.rmtree(root / "step_00000020")
    shutil.copytree(root / "step_00000010", root / "step_00000020")
    assert_found(root, "manifest.json is of step 10, but its folder is step_00000020", tensors_of(0))


def test_an_added_file_is_found(root, tensors_of):
    (root / "step_00000020" / ".metadata").write_bytes(b"anything")
    assert_found(root, ".metadata is unexpected", tensors_of(0))


def test_a_copy_under_a_name_of_its_own_can_be_loaded(root, tensors_of):
    tensors = tensors_of(0)
    copy = shutil.copytree(root / "step_00000020", root / "best")
    assert load_checkpoint(copy, tensors) == {"version": 2}
    assert torch.equal(tensors["model.weight"], tensors_of(2)["model.weight"])


def test_nothing_sound_is_an_error_that_names_every_fault_and_no_fresh_start(root):
    (root / "step_00000020" / "state.json").unlink()
    (root / "step_00000010" / "metadata.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        newest_complete(root)
    for expected in (
        "step_00000020: ",
        "state.json is missing",
        "step_00000010: ",
        "metadata.json is damaged",
        "step 0",
    ):
        assert expected in str(caught.value)


def test_a_newer_format_is_refused_as_such(root):
    rewrite(root / "step_00000020" / "manifest.json", lambda raw: raw.replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(CheckpointError, match="format 2 was written by a newer version"):
        verify(root / "step_00000020")


def test_an_absent_or_foreign_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        load_checkpoint(tmp_path / "absent", {})
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        load_checkpoint(tmp_path, {})


def test_a_damaged_step_is_replaced_when_it_is_saved_again(root, tensors_of):
    DAMAGES["shorter"](root / "step_00000020" / "rank00000-00000.safetensors")
    save_checkpoint(root, 20, tensors_of(5), {})
    newest = newest_complete(root)
    assert newest is not None
    assert newest.path.name == "step_00000020"
    assert newest.skipped == []
