"""`manifest.json`: the size and sha256 of every other file of a checkpoint.

The file has one legal spelling (`encode`) and carries a digest of its own content, so that a changed byte
in the manifest is found like a changed byte anywhere else.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemohybrid.checkpoint.files import FileEntry, explained, hash_file, write_file
from nemohybrid.checkpoint.folders import step_of
from nemohybrid.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
# One plain file name: no separator, no leading dot, nothing that could leave the folder.
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")


@dataclass(frozen=True)
class Manifest:
    """The step of a checkpoint and what each of its files must be."""

    step: int
    files: dict[str, FileEntry]


def is_file_name(name: object) -> bool:
    """Whether `name` is a plain file name that a checkpoint may hold."""
    return isinstance(name, str) and FILE_NAME.fullmatch(name) is not None


def encode(manifest: Manifest) -> bytes:
    """The one legal spelling of `manifest`."""
    files = {name: asdict(entry) for name, entry in sorted(manifest.files.items())}
    body = {"format": FORMAT, "step": manifest.step, "files": files}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps(body | {"sha256": digest}, indent=1) + "\n").encode()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json` and force it to the disk."""
    write_file(folder / MANIFEST, [encode(manifest)])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises CheckpointError when it is missing, damaged, of another format, names a file outside the folder,
    or belongs to another step than the folder's name says.
    """
    path = folder / MANIFEST
    raw = read_bytes(path)
    content = parse_json(raw, path)
    if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: format {content['format']} was written by a newer version; this one reads {FORMAT}"
        )
    manifest = decode(content, path)
    if encode(manifest) != raw:
        raise CheckpointError(f"{path} is damaged: its content does not match its own sha256")
    if step_of(folder) not in (None, manifest.step):
        raise CheckpointError(f"{path} is of step {manifest.step}, but its folder is {folder.name}")
    return manifest


def decode(content: Any, path: Path) -> Manifest:
    """Parsed JSON as a Manifest; CheckpointError where it has another shape or an unsafe file name."""
    try:
        step, listed = content["step"], content["files"].items()
        files = {name: FileEntry(entry["size"], entry["sha256"]) for name, entry in listed}
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: not a manifest ({error!r})") from error
    unsafe = next((name for name in files if not is_file_name(name) or name == MANIFEST), None)
    if unsafe is not None:
        raise CheckpointError(f"{path} is refused: {unsafe!r} is not a plain file name inside the checkpoint")
    if type(step) is not int or step < 0 or any(type(entry.size) is not int for entry in files.values()):
        raise CheckpointError(f"{path} is damaged: steps and sizes must be whole numbers")
    return Manifest(step, files)


def inspect(folder: Path) -> Manifest:
    """Check names and sizes, without reading the big files; CheckpointError names the first fault."""
    manifest = read_manifest(folder)
    present = {path.name: path for path in folder.iterdir() if path.name != MANIFEST}
    for name, entry in manifest.files.items():
        path = present.pop(name, None)
        if path is None:
            raise CheckpointError(f"{folder / name} is missing")
        refuse_odd(path)
        if (size := path.stat().st_size) != entry.size:
            raise CheckpointError(f"{path} is damaged: it has {size} bytes, {entry.size} were written")
    if present:
        raise CheckpointError(f"{min(present.values())} is unexpected: the checkpoint was saved without it")
    return manifest


def verify(folder: Path, part: int = 0, parts: int = 1) -> Manifest:
    """Check names, sizes and the sha256 of every file; returns the manifest.

    Several ranks share the work: rank `part` of `parts` hashes every `parts`-th file, and rank 0 looks at the names.
    Raises CheckpointError that names the first damaged, missing or extra file and how it differs.
    """
    with explained(f"reading {folder}"):
        manifest = inspect(folder) if part == 0 else read_manifest(folder)
        for name in sorted(manifest.files)[part::parts]:
            check_hash(folder / name, manifest.files[name], hash_file(folder / name))
    return manifest


def read_listed(folder: Path, name: str) -> Any:
    """The parsed content of a small JSON file of a checkpoint, checked against the manifest's hash."""
    entry = read_manifest(folder).files.get(name)
    if entry is None:
        raise CheckpointError(f"{folder / MANIFEST} does not list {name}: this is not a checkpoint of nemohybrid")
    raw = read_bytes(folder / name)
    check_hash(folder / name, entry, hashlib.sha256(raw).hexdigest())
    return parse_json(raw, folder / name)


def check_hash(path: Path, entry: FileEntry, found: str) -> None:
    """CheckpointError unless `found` is the sha256 that was taken when the file was written."""
    if found != entry.sha256:
        raise CheckpointError(f"{path} is damaged: its sha256 is {found[:12]}..., {entry.sha256[:12]}... was written")


def read_bytes(path: Path) -> bytes:
    """The content of a small regular file; CheckpointError when it is missing or cannot be read."""
    refuse_odd(path)
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def refuse_odd(path: Path) -> None:
    """CheckpointError for a link, which could point anywhere, and for folders, pipes and devices."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise CheckpointError(f"{path} is refused: not a regular file")


def parse_json(raw: bytes, path: Path) -> Any:
    """Parse strict JSON (no NaN, no infinity); CheckpointError says where it stops being JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(raw.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: not JSON ({error})") from error
