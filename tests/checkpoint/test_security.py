"""A checkpoint is data: nothing in its folder is ever executed, and nothing in it reaches outside."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from nemohybrid.checkpoint import load_checkpoint, newest_complete, read_metadata, read_state, save_checkpoint, verify
from nemohybrid.checkpoint.files import FileEntry, hash_file
from nemohybrid.checkpoint.manifest import MANIFEST, Manifest, encode, read_manifest
from nemohybrid.errors import CheckpointError

FILES = ["config.yaml", "manifest.json", "metadata.json", "rank00000-00000.safetensors", "state.json", "tokenizer.json"]


class Bomb:
    """Creates a sentinel file when it is unpickled."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


@pytest.fixture
def sentinel(tmp_path) -> Path:
    return tmp_path / "exploded"


@pytest.fixture
def folder(template, tmp_path) -> Path:
    return shutil.copytree(template, tmp_path / "run") / "step_00000020"


def forge_manifest(folder: Path) -> None:
    """What an attacker does after changing files: a manifest that is right for them."""
    entries = {p.name: FileEntry(p.stat().st_size, hash_file(p)) for p in folder.iterdir() if p.name != MANIFEST}
    (folder / MANIFEST).write_bytes(encode(Manifest(20, entries)))


def assert_refused(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Every way to read the folder either refuses it or, where the file at fault is not read, gives plain data."""
    with pytest.raises(CheckpointError):
        load_checkpoint(folder, tensors)
    for read in (verify, read_state, read_metadata, lambda path: newest_complete(path.parent)):
        try:
            read(folder)
        except CheckpointError:
            continue


def test_the_bomb_is_live(sentinel):
    pickle.loads(pickle.dumps(Bomb(sentinel)))  # noqa: S301
    assert sentinel.exists(), "the other tests of this file prove nothing with a dud"


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_bomb_in_place_of_any_file_is_refused_and_inert(name, folder, sentinel, tensors_of):
    (folder / name).write_bytes(pickle.dumps(Bomb(sentinel)))
    assert_refused(folder, tensors_of(0))
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["metadata.json", "rank00000-00000.safetensors", "state.json"])
@pytest.mark.parametrize("protocol", [0, 4])
def test_a_pickle_bomb_with_a_forged_manifest_is_refused_and_inert(name, protocol, folder, sentinel, tensors_of):
    (folder / name).write_bytes(pickle.dumps(Bomb(sentinel), protocol))
    forge_manifest(folder)
    assert_refused(folder, tensors_of(0))
    assert not sentinel.exists()


@pytest.mark.parametrize("name", [".metadata", "model.pt", "__init__.py", "rank00001-00000.safetensors"])
def test_a_pickle_bomb_as_an_additional_file_is_refused_and_inert(name, folder, sentinel, tensors_of):
    (folder / name).write_bytes(pickle.dumps(Bomb(sentinel)))
    assert_refused(folder, tensors_of(0))
    assert not sentinel.exists()


def test_loading_uses_no_unpickler(folder, tensors_of, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a checkpoint was unpickled")

    for target in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(target, refuse)
    tensors = tensors_of(0)
    load_checkpoint(folder, tensors)
    assert torch.equal(tensors["model.weight"], tensors_of(2)["model.weight"])


@pytest.mark.parametrize(
    "name", ["../victim", "/etc/hostname", "a/b", ".", "..", ".hidden", "", "a\0b", "manifest.json"]
)
def test_a_manifest_that_names_a_file_elsewhere_is_refused(name, folder):
    manifest = read_manifest(folder)
    (folder.parent / "victim").write_text("outside")
    forged = Manifest(20, manifest.files | {name: FileEntry(7, hash_file(folder.parent / "victim"))})
    (folder / MANIFEST).write_bytes(encode(forged))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        verify(folder)


def forge_metadata(folder: Path, **changes) -> None:
    """Change the chunk of model.weight in metadata.json, with a manifest that agrees."""
    content = json.loads((folder / "metadata.json").read_text())
    content["tensors"]["model.weight"]["chunks"][0].update(changes)
    (folder / "metadata.json").write_text(json.dumps(content))
    forge_manifest(folder)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"file": "../step_00000010/rank00000-00000.safetensors"}, "not a plain file name"),
        ({"file": "/etc/hostname"}, "not a plain file name"),
        ({"file": "absent.safetensors"}, "absent.safetensors"),
        ({"file": "config.yaml"}, "config.yaml is damaged: not the safetensors file"),
        ({"key": "model.norm"}, "model.norm is torch.bfloat16"),
        ({"key": "absent"}, "not the safetensors file"),
        ({"offsets": [3, 0]}, "reaches beyond"),
        ({"shape": [3, 4]}, "do not cover"),
        ({"shape": [6]}, "number of dimensions"),
        ({"shape": [6, -4]}, "not a list of sizes"),
        ({"shape": [6, 4.0]}, "not a list of sizes"),
        ({"shape": None}, "not the metadata"),
    ],
)
def test_forged_metadata_is_refused(changes, reason, folder, tensors_of):
    forge_metadata(folder, **changes)
    tensors = tensors_of(0)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(folder, tensors)
    assert tensors["model.weight"].abs().sum() == 0


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "NaN", "[]", "null", '{"files": [], "step": 20}', '{"step": "20", "files": {}}']
)
@pytest.mark.parametrize("name", ["manifest.json", "metadata.json"])
def test_json_of_another_shape_is_refused(name, text, folder):
    (folder / name).write_text(text)
    if name != MANIFEST:
        forge_manifest(folder)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        read_metadata(folder)


def test_saving_follows_no_link_that_waits_in_the_temporary_folder(tmp_path, tensors_of):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("keep")
    root = tmp_path / "run"
    root.mkdir()
    (root / ".tmp-step_00000001").symlink_to(outside)
    with pytest.raises(CheckpointError, match="tmp-step_00000001"):
        save_checkpoint(root, 1, tensors_of(1), {})
    assert [path.name for path in outside.iterdir()] == ["keep"]
