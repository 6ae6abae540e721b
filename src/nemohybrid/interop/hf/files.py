"""A Hugging Face folder as files: strict JSON, and tensors whose headers are all looked at before any value is read."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemohybrid.errors import CheckpointError
from nemohybrid.interop.hf.damage import first_damage

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST_TENSOR = "backbone.embeddings.weight"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what its header says. dtype as safetensors spells it."""

    file: Path
    shape: list[int]
    dtype: str


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. NaN is refused, an infinity is not: NVIDIA's configurations have one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair could not be printed or saved
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is no value")
    return float(text)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder by name, from the headers alone.

    Raises CheckpointError for missing, truncated or pickled weights, and where the index says anything that the files
    do not: the first such tensor is named.
    """
    listed = _weight_map(folder)
    tensors: dict[str, Stored] = {}
    for file in sorted({folder / name for name in listed.values()}) or [folder / WEIGHTS]:
        expected = next((name for name, place in listed.items() if place == file.name), FIRST_TENSOR)
        for name, stored in _header(file, expected):
            if listed and listed.get(name) != file.name:
                where = f"in {listed[name]}" if name in listed else "nowhere"
                raise CheckpointError(f"{folder / INDEX} says that {name} is {where}, but it is in {file.name}")
            tensors[name] = stored
    if absent := next((name for name in listed if name not in tensors), None):
        raise CheckpointError(f"{folder / INDEX} says that {absent} is in {listed[absent]}, but it is not")
    return tensors


def read_tensors(stored: dict[str, Stored], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `names`, in this order where a layer lies in one file, as views of the mapped files.

    Files are opened anew for each layer, so that the pages of one are mapped at a time. A view must not be kept.
    """
    for _, layer in groupby(names, key=layer_of):
        by_file = sorted(layer, key=lambda name: stored[name].file)
        for file, group in groupby(by_file, key=lambda name: stored[name].file):
            with _opened(file) as content:
                for name in group:
                    yield name, content.get_tensor(name)


def layer_of(name: str) -> str:
    """`backbone.layers.3.mixer.D` -> `backbone.layers.3`."""
    return ".".join(name.split(".")[:3])


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file, from the index; empty where there is a single file."""
    if (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has both {WEIGHTS} and {INDEX}: two sets of weights. Move one away")
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder / WEIGHTS} not found{_pickled(folder)}")
        return {}
    listed = json_object(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / INDEX} has no weight_map: tensor name -> file")
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX} says that {name} is in {file!r}: not a safetensors file in {folder}"
            )
        if file not in there:
            raise CheckpointError(f"{folder / file} not found; {folder / INDEX} says that it holds {name}")
    return listed


def _pickled(folder: Path) -> str:
    found = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    return f". {found[0]} is pickled, which could run code, and is never read; save it as safetensors" if found else ""


def _header(file: Path, expected: str) -> Iterator[tuple[str, Stored]]:
    """expected: the tensor to name where the header tells none."""
    with _opened(file, expected) as content:
        for name in content.keys():  # noqa: SIM118 - not a mapping
            entry = content.get_slice(name)
            yield name, Stored(file, entry.get_shape(), entry.get_dtype())


@contextmanager
def _opened(file: Path, expected: str = FIRST_TENSOR) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read: {first_damage(file, expected) or error}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
