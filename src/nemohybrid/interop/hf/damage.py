"""What is wrong with a safetensors file that cannot be read, told by the first tensor that is not whole."""

import json
import math
from pathlib import Path
from typing import Any

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1}
"""What a number takes, of the dtypes that weights have (https://huggingface.co/docs/safetensors)."""
LENGTH = 8
"""Bytes that say how long the header is."""


def first_damage(file: Path, expected: str) -> str:
    """The first tensor that the header does not place within the file; where there is no header, the one `expected`.

    An empty text where the header is sound as far as we can see. Raises OSError.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(LENGTH), "little")
        if size < LENGTH or length > size - LENGTH:
            return f"{expected} is lost: the file ends within its header, at byte {size}"
        header = content.read(length)
    try:
        entries = dict(json.loads(header))
    except (ValueError, TypeError, RecursionError):
        return f"{expected} is lost: the header is damaged"
    entries.pop("__metadata__", None)
    return _first_misplaced(entries, size - LENGTH - length)


def _first_misplaced(entries: dict[str, Any], size: int) -> str:
    """Tensors must follow one another from byte 0 to the last of `size` bytes of data."""
    if malformed := next((name for name, entry in entries.items() if not _is_entry(entry)), None):
        return f"{malformed!r} has a damaged entry in the header"
    end, last = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        if stop > size:
            return f"{name!r} is cut off: it needs the bytes {begin} to {stop} of the data, and the file holds {size}"
        needed = math.prod(entry["shape"]) * BYTES.get(entry["dtype"], 0)
        if begin != end or (needed and needed != stop - begin):
            return f"{name!r} does not lie where its shape and its neighbours say, in the bytes {end} to {end + needed}"
        end, last = stop, repr(name)
    return f"{size - end} bytes after {last} belong to no tensor" if end < size else ""


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    return len(offsets or ()) == 2 and all(type(number) is int and number >= 0 for number in numbers)
